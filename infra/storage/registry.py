"""The registry of versions: manifests that never change, the evidence on them, and the aliases that point to them.

Keys: `blobs/sha256/<64 hex>`, `models/NAME/3/manifest.json`, `models/NAME/3/evidence/<file>.json`,
`models/NAME/3/deleted.json` (a number is never given out twice) and `models/NAME/aliases/<alias>`.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from infra.errors import BadInput, PassingFault, StageFailed
from infra.storage.manifest import (
    NAME_PATTERN,
    Manifest,
    Source,
    StoredFile,
    StoredVariant,
    check_name,
    digest_of,
    digest_of_file,
    now,
)
from infra.storage.objects import ObjectStore

ALIAS_PATTERN = NAME_PATTERN
CHAMPION = "champion"
CANDIDATE = "candidate"


class ModelRegistry:
    """The versions, evidence and aliases in an object store."""

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects

    # Versions

    def add_files(self, folder: Path) -> tuple[StoredFile, ...]:
        """Store every file under a folder as blobs and return what a manifest says of them."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return tuple(self._add_file(path, path.relative_to(folder).as_posix()) for path in paths)

    def _add_file(self, path: Path, name: str) -> StoredFile:
        sha256 = digest_of_file(path)
        self.objects.put_file(_blob(sha256), path)
        return StoredFile(path=name, sha256=sha256, size_bytes=path.stat().st_size)

    def has_files(self, files: Iterable[StoredFile]) -> bool:
        """Whether every blob is there in full size."""
        return all(self.objects.size_bytes(_blob(file.sha256)) == file.size_bytes for file in files)

    def commit(
        self, name: str, source: Source, builder: Mapping[str, str], variants: Iterable[StoredVariant]
    ) -> tuple[Manifest, bool]:
        """Make a version of variants whose files are stored; returns it and whether it is new.

        The same content under the same name is the same version. Raises `PassingFault` when a blob went
        missing meanwhile (a delete ran beside this deploy).
        """
        content = tuple(sorted(variants, key=lambda variant: variant.precision))
        with self.objects.lock():
            missing = [file.path for variant in content for file in variant.files if not self.has_files([file])]
            if missing:
                raise PassingFault(f"The store lost {missing[0]} before its version was complete.", "Deploy again.")
            draft = Manifest(
                name=check_name(name),
                version=1,
                source=source,
                builder=dict(sorted(builder.items())),
                variants=content,
                created_at=now(),
            )
            for existing in self.versions(name):
                if existing.identity == draft.identity:
                    return existing, False
            version = max(self._numbers(name), default=0) + 1
            while True:
                manifest = draft.model_copy(update={"version": version})
                if self.objects.put_bytes_if_absent(_manifest(name, version), manifest.to_bytes()):
                    return manifest, True
                version += 1

    def _numbers(self, name: str) -> set[int]:
        """Every number ever given out, deleted versions included."""
        parts = (key.split("/") for key in self.objects.keys(f"models/{name}"))
        return {int(part[2]) for part in parts if part[2].isdecimal()}

    def names(self) -> list[str]:
        """Names that have at least one version."""
        keys = (key.split("/") for key in self.objects.keys("models"))
        return sorted({parts[1] for parts in keys if parts[-1] == "manifest.json"})

    def versions(self, name: str) -> list[Manifest]:
        """All versions of a name, oldest first."""
        numbers = sorted(self._numbers(name))
        found = (self._read_manifest(name, number) for number in numbers)
        return [manifest for manifest in found if manifest]

    def version(self, name: str, number: int | None = None) -> Manifest:
        """Return a version; without a number the champion, or else the newest.

        Raises `BadInput` when there is none.
        """
        if number is None:
            number = self.alias(name, CHAMPION) or max((one.version for one in self.versions(name)), default=0)
        manifest = self._read_manifest(name, number) if number else None
        if manifest is None:
            known = ", ".join(one.reference for one in self.versions(name)) or ", ".join(self.names()) or "nothing yet"
            raise BadInput(
                f"The store has no {f'{name}@{number}' if number else name}.", f"It has: {known}. See slmops list."
            )
        return manifest

    def _read_manifest(self, name: str, number: int) -> Manifest | None:
        try:
            data = self.objects.read_bytes(_manifest(name, number))
        except KeyError:
            return None
        try:
            manifest = Manifest.model_validate_json(data)
            fault = "" if (manifest.name, manifest.version) == (name, number) else f"it is of {manifest.reference}"
        except ValidationError as error:
            fault = error.errors()[0]["msg"]
        if fault:
            raise StageFailed(
                f"The manifest of {name}@{number} is not valid: {fault}.",
                "It was altered after it was stored: put it back as it was, or remove "
                f"{self.objects.uri(_manifest(name, number))} and deploy again.",
            )
        return manifest

    def delete(self, name: str, number: int) -> int:
        """Remove a version, its evidence, the aliases on it and the blobs that nothing else needs.

        Returns the bytes freed; raises `BadInput` when there is no such version.
        """
        manifest = self.version(name, number)
        with self.objects.lock():
            needed = self._needed_without(manifest)  # a damaged manifest stops this before anything is removed
            for alias, version in self.aliases(name).items():
                if version == number:
                    self.objects.delete(_alias(name, alias))
            tombstone = {"reference": manifest.reference, "manifest": manifest.digest, "deleted_at": now()}
            self.objects.put_bytes(f"models/{name}/{number}/deleted.json", _to_json(tombstone))
            self.objects.delete(_manifest(name, number))
            for key in list(self.objects.keys(f"models/{name}/{number}/evidence")):
                self.objects.delete(key)
            own = {file.sha256: file.size_bytes for variant in manifest.variants for file in variant.files}
            orphans = {sha256: size for sha256, size in own.items() if sha256 not in needed}
            for sha256 in orphans:
                self.objects.delete(_blob(sha256))
        return sum(orphans.values())

    def _needed_without(self, manifest: Manifest) -> set[str]:
        kept = (one for name in self.names() for one in self.versions(name) if one.reference != manifest.reference)
        return {file.sha256 for one in kept for variant in one.variants for file in variant.files}

    def materialize(self, files: Iterable[StoredFile], folder: Path) -> None:
        """Place files of the store under a folder that does not have them yet."""
        for file in files:
            try:
                self.objects.fetch_file(_blob(file.sha256), folder / file.path)
            except KeyError:
                raise StageFailed(
                    f"The store has lost the content of {file.path} ({file.sha256}).",
                    "Delete the version that needs it and deploy again.",
                ) from None

    def copy_files(self, files: Iterable[StoredFile], folder: Path) -> None:
        """Write the user's own copy of files of the store: independent of the store's, and writable."""
        for file in files:
            path = folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                self.materialize([file], Path(aside))
                shutil.copyfile(Path(aside) / file.path, path)

    def uri(self, manifest: Manifest, precision: str | None = None) -> str:
        """Return the address of a version, or of one of its variants (as a fragment)."""
        uri = self.objects.uri(_manifest(manifest.name, manifest.version))
        return f"{uri}#{precision}" if precision else uri

    # Evidence

    def add_evidence(self, manifest: Manifest, kind: str, content: Mapping[str, Any], key: str | None = None) -> None:
        """Append a record on a version. With a key, the record is the answer to that question and kept once."""
        record = {"kind": kind, "manifest": manifest.digest, "recorded_at": now(), "content": dict(content)}
        moment = re.sub(r"[^0-9]", "", str(record["recorded_at"]))[:20]
        name = f"{kind}-{key}.json" if key else f"{kind}-{moment}-{digest_of(record)[:8]}.json"
        self.objects.put_bytes(_evidence(manifest, name), _to_json(record))

    def evidence(self, manifest: Manifest, kind: str, key: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the contents of a version's records of a kind, oldest first."""
        prefix = f"{_evidence(manifest, kind)}-{f'{key}.json' if key else ''}"
        for path in self.objects.keys(f"models/{manifest.name}/{manifest.version}/evidence"):
            if path.startswith(prefix):
                record = json.loads(self.objects.read_bytes(path))
                if (record["kind"], record["manifest"]) == (kind, manifest.digest):
                    yield {**record["content"], "recorded_at": record["recorded_at"]}

    def latest_evidence(self, manifest: Manifest, kind: str, key: str | None = None) -> dict[str, Any] | None:
        """Return the newest record of a kind, or None."""
        records = sorted(self.evidence(manifest, kind, key), key=lambda record: str(record["recorded_at"]))
        return records[-1] if records else None

    def put_report(self, manifest: Manifest, name: str, text: str) -> str:
        """Store a report's text beside the evidence and return its address."""
        key = _evidence(manifest, name)
        self.objects.put_bytes(key, text.encode())
        return self.objects.uri(key)

    # Aliases

    def aliases(self, name: str) -> dict[str, int]:
        """Return alias -> version number."""
        keys = self.objects.keys(f"models/{name}/aliases")
        return {key.rsplit("/", 1)[1]: int(json.loads(self.objects.read_bytes(key))["version"]) for key in keys}

    def alias(self, name: str, alias: str) -> int | None:
        """Return the version number under an alias, or None."""
        return self.aliases(name).get(alias)

    def aliases_of(self, manifest: Manifest) -> tuple[str, ...]:
        """Return the aliases that point to a version."""
        return tuple(sorted(one for one, number in self.aliases(manifest.name).items() if number == manifest.version))

    def set_alias(self, name: str, alias: str, version: int, reason: str) -> None:
        """Point an alias to a version."""
        if not re.fullmatch(ALIAS_PATTERN, alias):
            raise BadInput(f"The alias {alias!r} is not valid.", "It is spelled like a model name.")
        record = {"version": version, "since": now(), "reason": reason}
        self.objects.put_bytes(_alias(name, alias), _to_json(record))

    def remove_alias(self, name: str, alias: str) -> None:
        """Remove an alias; nothing happens when it is not there."""
        self.objects.delete(_alias(name, alias))


def _to_json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _blob(sha256: str) -> str:
    return f"blobs/sha256/{sha256}"


def _manifest(name: str, version: int) -> str:
    return f"models/{name}/{version}/manifest.json"


def _evidence(manifest: Manifest, file: str) -> str:
    return f"models/{manifest.name}/{manifest.version}/evidence/{file}"


def _alias(name: str, alias: str) -> str:
    return f"models/{name}/aliases/{alias}"
