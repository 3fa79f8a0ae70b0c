"""Garbage in a store: it is found, reported and removed while deploys run."""

from collections.abc import Collection
from dataclasses import dataclass

from slmops.infra.process.call import OnProgress
from slmops.infra.storage.inputs import stored_inputs
from slmops.infra.storage.leases import WRITE_LEASE, collecting
from slmops.infra.storage.model_files import blob_of
from slmops.infra.storage.objects import BLOBS, Blob, Entry
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.version import Version

REMOVED_AT_ONCE = 500


@dataclass(frozen=True)
class Garbage:
    """The garbage that a collection found: unneeded blobs, evidence on deleted versions, and interrupted work.

    `spared_blobs` are those that a running deploy, push or ingestion still relies on.
    """

    blobs: tuple[Entry, ...]
    evidence: tuple[Entry, ...]
    leftovers: tuple[Entry, ...]
    spared_blobs: int

    @property
    def size_bytes(self) -> int:
        """Bytes that their removal frees."""
        return sum(entry.size_bytes for entry in (*self.blobs, *self.evidence, *self.leftovers))


def delete_version(version: Version, *, even_in_use: bool = True) -> int | None:
    """Remove a version, its evidence, the aliases on it and the blobs that nothing else needs; returns the bytes freed.

    It disappears in one step; `collect_garbage` removes the remains if this process is killed. With `even_in_use`
    false, a version that a running deploy uses stays, and None is returned. Raises `StageFailed`, and removes nothing,
    where another version's manifest cannot be read.
    """
    registry = version.registry
    own = {blob_of(file) for variant in version.variants for file in variant.files}
    with collecting(registry.objects) as collector:
        if not even_in_use and any(blob.sha256 in collector.spared for blob in own):
            return None
        needed = {blob.sha256 for blob in needed_blobs(registry, without=[version])} | collector.spared
        registry.mark_deleted(version.manifest)
        registry.objects.delete([entry.key for entry in version.evidence_entries()])
        orphans = [blob for blob in own if blob.sha256 not in needed]
        collector.renew()
        registry.objects.delete([blob.key for blob in orphans])
    return sum(blob.size_bytes for blob in orphans)


def claimed_blobs(registry: ModelRegistry) -> set[str]:
    """Return the SHA-256 of the blobs that running deploys, pushes and ingestions use now."""
    with collecting(registry.objects) as collector:
        return collector.spared


def needed_blobs(registry: ModelRegistry, without: Collection[Version] = ()) -> set[Blob]:
    """Return the blobs that a version or an input needs; raises `StageFailed` for one that cannot be read."""
    left_out = {version.reference for version in without}
    kept = (version for version in registry.all_versions() if version.reference not in left_out)
    files = [file for version in kept for variant in version.variants for file in variant.files]
    files += [file for stored in stored_inputs(registry) for file in stored.files]
    return {blob_of(file) for file in files}


def collect_garbage(
    registry: ModelRegistry,
    *,
    dry_run: bool = False,
    without: Collection[Version] = (),
    on_progress: OnProgress | None = None,
) -> Garbage:
    """Remove the store's garbage, or (`dry_run`) only find it; versions in `without` count as deleted.

    Writers wait meanwhile; blobs that they rely on stay. Raises `StageFailed`, and removes nothing, if a manifest
    cannot be read, because its blobs are not known.
    """
    objects = registry.objects
    with collecting(objects) as collector:
        _report(on_progress, 0, 1, "reading the versions")
        needed = {blob.sha256 for blob in needed_blobs(registry, without)}
        _report(on_progress, 0, 1, "listing the store")
        orphans = [entry for entry in objects.entries(BLOBS) if entry.key.rpartition("/")[2] not in needed]
        free = [entry for entry in orphans if entry.key.rpartition("/")[2] not in collector.spared]
        found = Garbage(
            blobs=tuple(free),
            evidence=tuple(registry.evidence_of_deleted()),
            leftovers=tuple(objects.leftovers(collector.now - WRITE_LEASE)),
            spared_blobs=len(orphans) - len(free),
        )
        if dry_run:
            return found
        keys = [entry.key for entry in (*found.evidence, *found.blobs)]
        for start in range(0, len(keys), REMOVED_AT_ONCE):
            _report(on_progress, start, len(keys), f"removing {len(keys):,} objects")
            collector.renew()
            objects.delete(keys[start : start + REMOVED_AT_ONCE])
        objects.remove_leftovers(found.leftovers)
    return found


def _report(on_progress: OnProgress | None, done: float, total: float, what: str) -> None:
    if on_progress:
        on_progress(done, total, what)
