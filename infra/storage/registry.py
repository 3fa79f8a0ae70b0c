"""The registry of versions: manifests that never change, the evidence on them, and the aliases that point to them.

Keys: `blobs/sha256/<64 hex>`, `models/NAME/3/manifest.json`, `models/NAME/3/evidence/<file>.json`,
`models/NAME/3/deleted.json` (the manifest stays, because a number is never assigned twice),
`models/NAME/aliases/<alias>`, `models/NAME/history/<number>.json` (see `slmops.infra.storage.champions`), `inputs/<64
hex>.json` (see `slmops.infra.storage.inputs`), `leases/` (see `slmops.infra.storage.leases`) and `promotions/` (see
`slmops.infra.storage.champion_lease`).
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from pydantic import ValidationError

from slmops.infra.errors import BadInput, PassingFault, StageFailed
from slmops.infra.storage.champions import ChampionChange, champion_changes, next_change, record_change
from slmops.infra.storage.manifest import Manifest, Source, StoredVariant, now
from slmops.infra.storage.model_files import ModelFiles, blob_of
from slmops.infra.storage.names import NAME_PATTERN, check_name
from slmops.infra.storage.objects import Entry
from slmops.infra.storage.version import Version

ALIAS_PATTERN = NAME_PATTERN
CHAMPION = "champion"
CANDIDATE = "candidate"


class ModelRegistry(ModelFiles):
    """The versions, evidence and aliases in an object store, in addition to the files of its models."""

    # Versions

    def commit(
        self, name: str, source: Source, builder: Mapping[str, str], variants: Iterable[StoredVariant]
    ) -> tuple[Manifest, bool]:
        """Make a version of variants whose files are stored; returns it, and whether it is new.

        The same content under the same name is the same version. Raises `PassingFault` if a blob was removed meanwhile
        (a delete ran at the same time).
        """
        draft = Manifest(
            name=check_name(name),
            version=1,
            source=source,
            builder=dict(sorted(builder.items())),
            variants=tuple(sorted(variants, key=lambda variant: variant.precision)),
            created_at=now(),
        )
        return self.add_version(draft, renumber=True)

    def add_version(self, draft: Manifest, *, renumber: bool) -> tuple[Manifest, bool]:
        """Add a manifest whose files are stored, under the next free number or (not `renumber`) under its own.

        Returns the version and whether it is new: a version of the same identity may exist. Every number is checked
        before the next one is tried, and taken by a conditional write. So concurrent writers never share a number, and
        two writers of the same content get the same version. Its files stay claimed until `release_files`, so work on
        the version can continue during a garbage collection. Raises `PassingFault` for a blob that is not there,
        `BadInput` when the draft's own number is another version's.
        """
        name = draft.name
        files = [file for variant in draft.variants for file in variant.files]
        if missing := self.claim_files(files):
            lost = next(file.path for file in files if blob_of(file) in missing)
            raise PassingFault(
                f"The store lost {lost} before its version was complete.", "Try again.", code="content-lost-meanwhile"
            )
        taken = self._numbers(name)  # before its versions: one that is added meanwhile is either read or found below
        existing = self.same_version(draft)
        if existing:
            return existing, False
        for number in itertools.count(max(taken, default=0) + 1) if renumber else [draft.version]:
            manifest = draft.model_copy(update={"version": number})
            free = renumber or number not in taken
            if free and self.objects.put_bytes_if_absent(_manifest(name, number), manifest.to_bytes()):
                return manifest, True
            other = self._read_manifest(name, number)
            if other and other.identity == draft.identity and not self._is_deleted(name, number):
                return other, False
        raise self._number_taken(draft)

    def same_version(self, draft: Manifest) -> Manifest | None:
        """Return the version of the draft's name that has its identity, whatever its number, or None."""
        known = self._manifests(draft.name)
        return next((manifest for manifest in known if manifest.identity == draft.identity), None)

    def check_number(self, draft: Manifest) -> None:
        """Raise `BadInput` if a draft's own number was assigned before, even if that version is deleted now."""
        if draft.version in self._numbers(draft.name):
            raise self._number_taken(draft)

    def _number_taken(self, draft: Manifest) -> BadInput:
        return BadInput(
            f"The store has, or had, another {draft.reference} ({self.objects.uri('models')}).",
            "Use --renumber to take the next free number there.",
            code="version-taken",
        )

    def _numbers(self, name: str) -> set[int]:
        """Every number ever assigned, including those of deleted versions."""
        return {int(number) for number in self._index(name) if number.isdecimal()}

    def _index(self, name: str) -> dict[str, set[str]]:
        """Return number (or `aliases`) -> the keys below it, as relative names."""
        return {number: keys for (_, number), keys in self._keys(f"models/{name}").items()}

    def _keys(self, folder: str) -> dict[tuple[str, str], set[str]]:
        """Return (name, number) -> the keys below it. Foreign files are ignored."""
        keys: dict[tuple[str, str], set[str]] = {}
        for entry in self.objects.entries(folder):
            parts = entry.key.split("/", 3)
            if len(parts) == 4:
                keys.setdefault((parts[1], parts[2]), set()).add(parts[3])
        return keys

    def names(self) -> list[str]:
        """Names that have at least one version."""
        return sorted({name for (name, _), keys in self._keys("models").items() if _is_version(keys)})

    def version_entries(self) -> dict[tuple[str, int], tuple[Entry, ...]]:
        """Return (name, number) -> the stored objects of each version, from one listing."""
        entries: dict[tuple[str, str], list[tuple[str, Entry]]] = {}
        for entry in self.objects.entries("models"):
            parts = entry.key.split("/", 3)
            if len(parts) == 4 and parts[2].isdecimal():
                entries.setdefault((parts[1], parts[2]), []).append((parts[3], entry))
        return {
            (name, int(number)): tuple(entry for _, entry in stored)
            for (name, number), stored in entries.items()
            if _is_version({key for key, _ in stored})
        }

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, oldest first."""
        return [self.of(manifest) for manifest in self._manifests(name)]

    def _manifests(self, name: str) -> list[Manifest]:
        index = self._index(name)
        numbers = sorted(int(number) for number, keys in index.items() if number.isdecimal() and _is_version(keys))
        found = (self._read_manifest(name, number) for number in numbers)
        return [manifest for manifest in found if manifest]

    def all_versions(self) -> Iterator[Version]:
        """Yield all versions of all names, sorted by name, and each name's oldest version first."""
        for name in self.names():
            yield from self.versions(name)

    def version(self, name: str, number: int | None = None) -> Version:
        """Return a version; without a number the champion, or else the newest.

        Raises `BadInput` when there is none.
        """
        if number is None:
            number = self.alias(name, CHAMPION) or max((version.number for version in self.versions(name)), default=0)
        manifest = self._read_manifest(name, number) if number else None
        if manifest is None or self._is_deleted(name, number):
            known = (
                ", ".join(version.reference for version in self.versions(name))
                or ", ".join(self.names())
                or "nothing yet"
            )
            near = get_close_matches(name, self.names(), n=1)
            hint = f"Did you mean {near[0]}? " if near and near[0] != name else ""
            raise BadInput(
                f"The store has no {f'{name}@{number}' if number else name}.",
                f"{hint}It has: {known}. See slmops list.",
                code="version-missing",
            )
        return self.of(manifest)

    def of(self, manifest: Manifest) -> Version:
        """Return a version of this registry by its manifest."""
        return Version(self, manifest)

    def find(self, reference: str) -> Version:
        """Return the version that `NAME`, `NAME@VERSION` or `NAME@ALIAS` names; raises `BadInput` if there is none."""
        name, at, wanted = reference.partition("@")
        check_name(name)
        if re.fullmatch(r"[1-9][0-9]{0,8}", wanted):
            return self.version(name, int(wanted))
        if not at:
            return self.version(name)
        number = self.alias(name, wanted) if re.fullmatch(ALIAS_PATTERN, wanted) else None
        if number is None:
            aliases = ", ".join(self.aliases(name)) or "none"
            raise BadInput(
                f"{reference!r} names no version.",
                f"Write NAME@VERSION with a positive integer, such as home@3, or an alias of {name}'s: {aliases}.",
                code="reference-not-valid",
            )
        return self.version(name, number)

    def mark_deleted(self, manifest: Manifest) -> None:
        """Make a version invisible and remove its aliases; its number stays taken, because its manifest stays."""
        for alias in self.aliases_of(manifest):
            self.remove_alias(manifest.name, alias, f"{manifest.reference} was deleted")
        record = {"reference": manifest.reference, "manifest": manifest.digest, "deleted_at": now()}
        key = f"{_version(manifest.name, manifest.version)}/deleted.json"
        try:
            self.objects.put_bytes(key, _to_json(record))
        except StageFailed:  # a full disk takes an empty file; that the mark exists is enough
            self.objects.put_bytes(key, b"")

    def _is_deleted(self, name: str, number: int) -> bool:
        try:
            self.objects.read_bytes(f"{_version(name, number)}/deleted.json")
        except KeyError:
            return False
        return True

    def _read_manifest(self, name: str, number: int) -> Manifest | None:
        try:
            data = self.objects.read_bytes(_manifest(name, number))
        except KeyError:
            return None
        try:
            manifest = Manifest.model_validate_json(data)
            fault = "" if (manifest.name, manifest.version) == (name, number) else f"it belongs to {manifest.reference}"
        except ValidationError as error:
            fault = error.errors()[0]["msg"]
        if fault:
            raise StageFailed(
                f"The manifest of {name}@{number} is not valid: {fault}.",
                "It was altered after it was stored: restore it, or remove "
                f"{self.objects.uri(_manifest(name, number))} and deploy again.",
                code="manifest-damaged",
            )
        return manifest

    def evidence_of_deleted(self) -> list[Entry]:
        """Return the evidence on deleted versions, which an interrupted deletion left."""
        entries = list(self.objects.entries("models"))
        deleted = {entry.key.removesuffix("/deleted.json") for entry in entries if entry.key.endswith("/deleted.json")}
        return [
            entry for entry in entries if "/evidence/" in entry.key and entry.key.partition("/evidence/")[0] in deleted
        ]

    # Aliases

    def aliases(self, name: str) -> dict[str, int]:
        """Return alias -> version number."""
        keys = [entry.key for entry in self.objects.entries(f"models/{name}/aliases")]
        found = {key.rsplit("/", 1)[1]: self._aliased(key) for key in keys}
        return {alias: number for alias, number in found.items() if number}

    def _aliased(self, key: str) -> int | None:
        try:
            record = self.objects.read_bytes(key)
        except KeyError:  # it does not exist, or was removed meanwhile
            return None
        try:
            return int(json.loads(record)["version"])
        except (ValueError, TypeError, KeyError):
            raise StageFailed(
                f"The alias {self.objects.uri(key)} is not valid.",
                "It was altered: set it again, or remove the file.",
                code="alias-damaged",
            ) from None

    def alias(self, name: str, alias: str) -> int | None:
        """Return the version number under an alias, or None."""
        return self._aliased(_alias(name, alias))

    def aliases_of(self, manifest: Manifest) -> tuple[str, ...]:
        """Return the aliases that point to a version."""
        return tuple(
            sorted(alias for alias, number in self.aliases(manifest.name).items() if number == manifest.version)
        )

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        reason: str,
        *,
        only_if_free: bool = False,
        rolled_back: bool = False,
    ) -> bool:
        """Point an alias to a version; returns whether it points there now.

        With `only_if_free`, an existing alias is not changed, even if two machines set it at once. A change of the
        champion is added to its history, as `rolled_back` or promoted. Raises `BadInput` for an alias that is not a
        valid name, or is all digits.
        """
        if not re.fullmatch(ALIAS_PATTERN, alias) or alias.isdecimal():
            raise BadInput(
                f"The alias {alias!r} is not valid.",
                "An alias is spelled like a model name, and is not a number.",
                code="alias-not-valid",
            )
        if alias == CHAMPION:
            former = self.alias(name, CHAMPION)
            if former is not None and only_if_free:
                return False
            record_change(self.objects, name, version, former, reason, rolled_back=rolled_back)
        record = _to_json({"version": version, "since": now(), "reason": reason})
        if only_if_free:
            return self.objects.put_bytes_if_absent(_alias(name, alias), record)
        self.objects.put_bytes(_alias(name, alias), record)
        return True

    def replace_champion(
        self, name: str, version: int, former: int | None, reason: str, *, rolled_back: bool = False
    ) -> bool:
        """Make a version the champion in place of `former`; returns False, with nothing changed, if `former` is not it.

        Processes that replace a champion at once compete for the same place in its history, and one of them gets it.
        """
        place = next_change(self.objects, name)  # before the alias is read: a later change of it takes this place
        if self.alias(name, CHAMPION) != former:
            return False
        change = (version, former, reason)
        if not record_change(self.objects, name, *change, rolled_back=rolled_back, place=place):
            return False
        record = _to_json({"version": version, "since": now(), "reason": reason})
        if former is None:
            return self.objects.put_bytes_if_absent(_alias(name, CHAMPION), record)
        self.objects.put_bytes(_alias(name, CHAMPION), record)
        return True

    def remove_alias(self, name: str, alias: str, reason: str = "") -> None:
        """Remove an alias; a missing one is no error."""
        if alias == CHAMPION and (former := self.alias(name, CHAMPION)) is not None:
            record_change(self.objects, name, None, former, reason, rolled_back=False)
        self.objects.delete([_alias(name, alias)])

    def champion_history(self, name: str) -> list[ChampionChange]:
        """Return the changes of a name's champion, newest first."""
        return champion_changes(self.objects, name, self.alias(name, CHAMPION))


def _to_json(record: Mapping[str, object]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _is_version(keys: set[str]) -> bool:
    return "manifest.json" in keys and "deleted.json" not in keys


def _version(name: str, version: int) -> str:
    return f"models/{name}/{version}"


def _manifest(name: str, version: int) -> str:
    return f"{_version(name, version)}/manifest.json"


def _alias(name: str, alias: str) -> str:
    return f"models/{name}/aliases/{alias}"
