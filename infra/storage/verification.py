"""Whether a version in a store is unchanged."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slmops.infra.process.call import OnProgress
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.model_files import blob_of
from slmops.infra.storage.objects import Blob
from slmops.infra.storage.progress import byte_progress
from slmops.infra.storage.version import Version


@dataclass(frozen=True)
class Damage:
    """One damaged object: `what` is a file (`int4/model.onnx`), a record or the manifest."""

    what: str
    fault: Literal["missing", "altered", "truncated"]
    detail: str
    blob: Blob | None = None


@dataclass(frozen=True)
class Verification:
    """The numbers of files and bytes that were read and compared (each content once), and all damage found."""

    reference: str
    manifest_sha256: str
    files: int
    size_bytes: int
    damage: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether the version is as it was stored."""
        return not self.damage


def verify_version(version: Version, on_progress: OnProgress | None = None) -> Verification:
    """Compare all stored files of a version with its manifest, and the manifest with the evidence."""
    paths: dict[Blob, list[str]] = {}
    for variant in version.variants:
        for file in variant.files:
            paths.setdefault(blob_of(file), []).append(f"{variant.precision}/{file.path}")
    on_bytes = byte_progress(on_progress, paths, "reading")
    damage = _damage_of_manifest(version)
    for blob, sha256, size_bytes in version.registry.objects.digests(paths, on_bytes):
        if sha256 != blob.sha256:
            damage += [_damage_of(what, blob, sha256, size_bytes) for what in paths[blob]]
    return Verification(
        reference=version.reference,
        manifest_sha256=version.manifest.digest,
        files=sum(len(names) for names in paths.values()),
        size_bytes=sum(blob.size_bytes for blob in paths),
        damage=tuple(damage),
    )


def repair_version(
    version: Version,
    found: Verification,
    others: Sequence[LocalObjectStore],
    on_progress: OnProgress | None = None,
) -> int:
    """Restore a version's damaged files from intact copies in another store; returns how many were restored."""
    damaged = {fault.blob for fault in found.damage if fault.blob}
    whole: dict[Blob, Path] = {}
    for other in others:
        for blob, sha256, _ in other.digests(damaged - whole.keys()):
            if sha256 == blob.sha256:
                whole[blob] = other.blob_path(blob)
    version.registry.objects.put_blobs(list(whole.items()), byte_progress(on_progress, whole, "repairing"))
    return len(whole)


def _damage_of(what: str, blob: Blob, sha256: str | None, size_bytes: int) -> Damage:
    if sha256 is None:
        return Damage(what, "missing", f"{blob.key} is not in the store", blob)
    if size_bytes < blob.size_bytes:
        return Damage(what, "truncated", f"it has {size_bytes:,} of {blob.size_bytes:,} bytes", blob)
    return Damage(what, "altered", f"its SHA-256 is {sha256}, the manifest says {blob.sha256}", blob)


def _damage_of_manifest(version: Version) -> list[Damage]:
    damage = []
    manifest, objects = version.manifest, version.registry.objects
    stored = version.stored_manifest()
    if hashlib.sha256(stored).hexdigest() != manifest.digest:
        damage.append(Damage("manifest.json", "altered", "it is not in the form in which slmops writes manifests"))
    for entry in version.evidence_entries():
        name = entry.key.rpartition("/")[2]
        if not name.endswith(".json"):
            continue
        try:
            named = json.loads(objects.read_bytes(entry.key))["manifest"]
        except (ValueError, TypeError, KeyError, RecursionError):
            damage.append(Damage(f"evidence/{name}", "altered", "it is not a record"))
            continue
        if named != manifest.digest:
            detail = f"its SHA-256 is {manifest.digest}, evidence/{name} belongs to one with {named}"
            damage.append(Damage("manifest.json", "altered", detail))
            break
    return damage
