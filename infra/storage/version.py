"""A version: a manifest in its registry, with its evidence and its variants."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.model_screening import screen_model
from slmops.infra.process.call import OnProgress
from slmops.infra.storage.evidence import (
    DEPLOY,
    NOTE,
    SELECTION,
    STATEMENTS,
    TAG,
    DamagedEvidence,
    Deployed,
    Envelope,
    Kind,
    Note,
    Recorded,
    Tag,
    first_fault,
)
from slmops.infra.storage.manifest import Manifest, StoredFile, StoredVariant, digest_of, digest_of_file, now
from slmops.infra.storage.objects import Entry

if TYPE_CHECKING:
    from slmops.infra.storage.registry import ModelRegistry

T = TypeVar("T")
Where = Callable[[Mapping[str, object]], bool]


def always(_: Mapping[str, object]) -> bool:
    """Every record."""
    return True


@dataclass(frozen=True)
class Version:
    """A manifest in its registry: everything stored under the version is read and written through it.

    Nothing is cached: each access reads the store. Raises `DamagedEvidence` for a record that is not valid for its
    kind, and the store's own errors (`slmops.infra.storage.objects.ObjectStore`).
    """

    registry: "ModelRegistry"
    manifest: Manifest

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def number(self) -> int:
        """The number, starting with 1."""
        return self.manifest.version

    @property
    def reference(self) -> str:
        """`NAME@NUMBER`."""
        return self.manifest.reference

    @property
    def uri(self) -> str:
        """The address of its manifest in the store."""
        return self.registry.objects.uri(self.manifest.key)

    def stored_manifest(self) -> bytes:
        """Return its manifest as it is in the store."""
        return self.registry.objects.read_bytes(self.manifest.key)

    # Variants

    @property
    def variants(self) -> tuple["Variant", ...]:
        """All its variants, in the manifest's order."""
        return tuple(Variant(self, stored) for stored in self.manifest.variants)

    def variant(self, precision: str) -> "Variant":
        """Return the variant of a precision; raises `BadInput` when the version has none."""
        return Variant(self, self.manifest.variant(precision))

    @property
    def serving(self) -> "Variant | None":
        """The variant that may serve under the model's name, or None.

        It is the variant that was selected last. A selection chooses among the variants that passed the gate, were
        registered and proven; if there is none, it removes the previous selection. If a deploy was recorded after the
        selection, that record must have the variant registered (the run that selects records its deploy at its end).
        Everything that serves, promotes, copies, lists or calls a version uses this property.
        """
        selections, deploys = self.records(SELECTION), self.records(DEPLOY)
        selected = selections[-1].value.selected if selections else None
        stored = next((variant for variant in self.variants if variant.precision == selected), None)
        if stored and deploys and deploys[-1].at > selections[-1].at:
            deployed = deploys[-1].value.variant(stored.precision)
            return stored if deployed and deployed.status == "registered" else None
        return stored

    def require_serving(self) -> "Variant":
        """Return the variant that may serve; raises `BadInput`, with the recorded statuses, if there is none."""
        serving = self.serving
        if serving is None:
            told = (
                ", ".join(f"{variant.precision} {variant.status}" for variant in self.deployed.variants)
                or "never judged"
            )
            raise BadInput(
                f"{self.reference} has no variant that passed and was selected ({told}).",
                f"Judge it with slmops regate {self.reference}; slmops show prints its evidence.",
                code="version-not-proven",
            )
        return serving

    # Evidence

    def record(
        self, kind: Kind[T], value: T, key: str | None = None, beside: Mapping[str, object] | None = None
    ) -> None:
        """Append a record, with the fields `beside` it if its kind has a field for the record.

        With a key, the record is the answer to that question, and a new answer replaces it.
        """
        content = kind.to_content(value, beside)
        record = {"kind": kind.name, "manifest": self.manifest.digest, "recorded_at": now(), "content": content}
        moment = re.sub(r"[^0-9]", "", str(record["recorded_at"]))[:20]
        file = f"{kind.name}-{key}.json" if key else f"{kind.name}-{moment}-{digest_of(record)[:8]}.json"
        data = (json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
        self.registry.objects.put_bytes(self.evidence_key(file), data)

    def latest(self, kind: Kind[T], key: str | None = None) -> T | None:
        """Return the newest record of a kind (with a key: the answer to that question), or None."""
        records = self.records(kind, key)
        return records[-1].value if records else None

    def all(self, kind: Kind[T], where: Where = always) -> list[T]:
        """Return the records of a kind, oldest first; see `records`."""
        return [record.value for record in self.records(kind, where=where)]

    def records(self, kind: Kind[T], key: str | None = None, where: Where = always) -> list[Recorded[T]]:
        """Return the records of a kind and when each was appended, oldest first.

        Records whose content, a JSON object, does not satisfy `where` are left out before they are validated.
        """
        found = []
        for entry, envelope in self.envelopes(kind.name, key):
            if where(envelope.content):
                try:
                    value = kind.from_content(envelope.content)
                except ValidationError as error:
                    raise self._damaged(entry, first_fault(error)) from None
                found.append(Recorded(envelope.recorded_at, value, envelope.content))
        return found

    def envelopes(self, kind: str, key: str | None = None) -> list[tuple[Entry, Envelope]]:
        """Return the files of a kind, oldest first, without those of another version or kind.

        A file that is removed meanwhile is left out. Evidence that was copied with the version was not verified here.
        It counts only if this store has none of the kind, and never as the answer to a question.
        """
        prefix = self.evidence_key(f"{kind}-{f'{key}.json' if key else ''}")
        # Only these are records, and are marked when they are copied. The folder also has reports, with any name.
        records = [entry for entry in self.evidence_entries() if entry.key.endswith(".json")]
        files = [entry for entry in records if entry.key.startswith(prefix)]
        found = [(entry, envelope) for entry in files for envelope in self._read(entry)]
        fitting = [(entry, told) for entry, told in found if (told.kind, told.manifest) == (kind, self.manifest.digest)]
        own = [(entry, told) for entry, told in fitting if told.copied_from is None]
        counting = fitting if kind in STATEMENTS or not (own or key) else own
        return sorted(counting, key=lambda record: record[1].recorded_at)

    def _read(self, entry: Entry) -> Iterator[Envelope]:
        try:
            data = self.registry.objects.read_bytes(entry.key)
        except KeyError:
            return
        yield self._envelope(entry, data)

    def read_evidence(self, entry: Entry) -> bytes:
        """Return a file of evidence as it is stored; raises `DamagedEvidence` if it is not a record of the version.

        Reports are texts, and are not checked.
        """
        data = self.registry.objects.read_bytes(entry.key)
        if entry.key.endswith(".json") and self._envelope(entry, data).manifest != self.manifest.digest:
            raise self._damaged(entry, "it belongs to another version")
        return data

    def _envelope(self, entry: Entry, data: bytes) -> Envelope:
        try:
            return Envelope.model_validate_json(data)
        except ValidationError as error:
            raise self._damaged(entry, first_fault(error)) from None

    def _damaged(self, entry: Entry, fault: str) -> DamagedEvidence:
        return DamagedEvidence(
            f"The evidence {self.registry.objects.uri(entry.key)} of {self.reference} is not valid: {fault}.",
            "It was altered, or another version of slmops wrote it: restore it, or remove the file.",
        )

    def evidence_key(self, file: str) -> str:
        """Return the store's key of a file of evidence."""
        return f"{self.manifest.folder}/evidence/{file}"

    def evidence_entries(self) -> list[Entry]:
        """Return the objects that are evidence, reports among them."""
        return list(self.registry.objects.entries(f"{self.manifest.folder}/evidence"))

    def put_report(self, file: str, text: str) -> str:
        """Store a report's text beside the evidence and return its address."""
        self.registry.objects.put_bytes(self.evidence_key(file), text.encode())
        return self.registry.objects.uri(self.evidence_key(file))

    def report(self, file: str) -> str | None:
        """Return the text of a stored report, or None if there is none."""
        key = self.evidence_key(file)
        if all(entry.key != key for entry in self.evidence_entries()):
            return None
        return self.registry.objects.read_bytes(key).decode(errors="replace")

    # Evidence, aliases, tags and notes

    @property
    def deployed(self) -> Deployed:
        """The record of its last deploy or regate; an empty record if there was none."""
        return self.latest(DEPLOY) or Deployed()

    @property
    def says_origin(self) -> bool:
        """Whether its verdict was copied with it, and this store has not judged it."""
        return any(envelope.copied_from is not None for _, envelope in self.envelopes(DEPLOY.name))

    @property
    def aliases(self) -> tuple[str, ...]:
        """The aliases that point to it."""
        return self.registry.aliases_of(self.manifest)

    @property
    def tags(self) -> dict[str, str]:
        """Its tags."""
        latest = {record.tag: record.value for record in self.all(TAG)}
        return {tag: value for tag, value in sorted(latest.items()) if value is not None}

    def set_tag(self, tag: str, value: str | None) -> None:
        """Set, change or remove (None) a tag; earlier values stay recorded."""
        self.record(TAG, Tag(tag=tag, value=value))

    @property
    def notes(self) -> list[Recorded[Note]]:
        """Its notes, oldest first."""
        return self.records(NOTE)

    def add_note(self, text: str) -> None:
        """Add a note."""
        self.record(NOTE, Note(text=text))

    def in_use(self) -> AbstractContextManager[None]:
        """Keep it from being collected by `gc --keep` while this process works with it."""
        return self.registry.in_use(self.manifest)


@dataclass(frozen=True)
class Variant:
    """One precision of a version: its entry in the manifest, and its files in the store."""

    version: Version
    stored: StoredVariant

    @property
    def precision(self) -> str:
        """Its precision, by which the version names it."""
        return self.stored.precision

    @property
    def device(self) -> str:
        """The device that it was built for."""
        return self.stored.device

    @property
    def execution_provider(self) -> str:
        """The execution provider that it was built for."""
        return self.stored.execution_provider

    @property
    def recipe(self) -> str:
        """The recipe that it was built by."""
        return self.stored.recipe

    @property
    def digest(self) -> str:
        """SHA-256 over the paths and digests of its files."""
        return self.stored.digest

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Its files."""
        return self.stored.files

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        return self.stored.size_bytes

    @property
    def uri(self) -> str:
        """Its address: the version's, with the precision as fragment."""
        return f"{self.version.uri}#{self.precision}"

    def place(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Place its files under a folder that does not have them yet, for a runtime to open.

        Every model reaches a runtime through this method, whatever its origin. Raises `StageFailed` as
        `ModelRegistry.materialize` does, and for a model that `slmops.infra.model_screening` refuses.
        """
        self.version.registry.materialize(self.files, folder, on_progress)
        try:
            screen_model(folder)
        except BadInput as error:
            message = f"{self.version.reference} {self.precision}: {error.message}"
            raise StageFailed(message, error.what_to_do, code=error.code) from None

    def altered_in(self, folder: Path, without: Collection[str] = ()) -> list[str]:
        """Return its files, except those in `without`, that differ in a folder from the manifest."""
        files = ((file, folder / file.path) for file in self.files if file.path not in without)
        return [file.path for file, path in files if not path.is_file() or digest_of_file(path) != file.sha256]

    def check_unaltered(self, folder: Path) -> None:
        """Raise `StageFailed` unless every file in a folder matches the manifest."""
        if altered := self.altered_in(folder):
            raise StageFailed(
                f"{altered[0]} is not what the version's manifest says it is.",
                "slmops verify shows whether the store's copy is damaged; --repair restores it.",
                code="content-altered",
            )
