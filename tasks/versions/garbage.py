"""Stage "collect": remove garbage from the store and from this machine."""

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from prefect.artifacts import create_table_artifact

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foundry.server_client import running_servers
from slmops.infra.process.call import OnProgress
from slmops.infra.records import Record
from slmops.infra.settings import Settings
from slmops.infra.storage.champions import champion_before
from slmops.infra.storage.garbage import claimed_blobs, collect_garbage, delete_version, needed_blobs
from slmops.infra.storage.leases import WRITE_LEASE
from slmops.infra.storage.leftovers import leftovers_in, old_leftovers_in, remove, size_of, unfinished_in
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.objects import BLOBS
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.version import Version
from slmops.tasks.foundry.registration import unregister_version
from slmops.tasks.report.models import post_models
from slmops.tasks.runs.artifacts import shown_in_prefect
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import Workshop, workshop


class Collection(Record):
    """What a garbage collection removed, or (`dry_run`) would remove; sizes in bytes.

    `versions` are NAME@VERSION; those `in_use` stayed because a running deploy uses them. No version needs the
    `spared_blobs`, but a running deploy, push or ingestion does. `cached_bytes` were on this machine only.
    """

    dry_run: bool
    versions: tuple[str, ...]
    in_use: tuple[str, ...]
    blobs: int
    leftovers: int
    freed_bytes: int
    spared_blobs: int
    cached_bytes: int

    @property
    def summary(self) -> str:
        """One sentence on what was removed."""
        done = "Would remove" if self.dry_run else "Removed"
        versions = ", ".join(self.versions) or "no version"
        return (
            f"{done} {versions}, {self.blobs:,} files that nothing needs and {self.leftovers:,} leftovers: "
            f"{self.freed_bytes / 1e6:,.1f} MB in the store, {self.cached_bytes / 1e6:,.1f} MB on this machine."
        )


def collect(
    shop: Workshop,
    *,
    keep: int | None,
    dry_run: bool,
    on_progress: OnProgress | None = None,
) -> Collection:
    """Remove old versions (with `keep`) and everything that no version needs, while deploys may run.

    With `keep`, that many of a name's newest versions stay, every version with an alias, and the former champion, to
    which a rollback returns; the others are unregistered and deleted. Raises `BadInput` for a `keep` below 1,
    `StageFailed` if a manifest cannot be read; nothing is removed then.
    """
    if keep is not None and keep < 1:
        raise BadInput(f"--keep is {keep}.", "Keep at least one version of each name.", code="keep-not-valid")
    registry, cache_dir = shop.registry, shop.settings.cache_dir
    # First, because it writes nothing: the leases of the collection itself need a little room on a full disk.
    interrupted_bytes = _clean_interrupted(shop.settings, dry_run=dry_run)
    needed = {blob.sha256 for blob in needed_blobs(registry)}  # every manifest must be readable, or nothing is removed
    claimed = claimed_blobs(registry)
    old = (
        []
        if keep is None
        else [version for name in registry.names() for version in _old_versions(registry, name, keep)]
    )
    in_use = [version for version in old if claimed & _blobs_of(version)]
    freed_bytes = 0
    for version in old:
        if version not in in_use and not dry_run:
            unregister_version(version, shop.settings)
            freed_bytes += delete_version(version, even_in_use=False) or 0
    deleted = [version for version in old if version not in in_use]
    found = collect_garbage(registry, dry_run=dry_run, without=deleted, on_progress=on_progress)
    return Collection(
        dry_run=dry_run,
        versions=tuple(version.reference for version in deleted),
        in_use=tuple(version.reference for version in in_use),
        blobs=len(found.blobs),
        leftovers=len(found.leftovers) + len(found.evidence),
        freed_bytes=freed_bytes + found.size_bytes,
        spared_blobs=found.spared_blobs,
        cached_bytes=interrupted_bytes + _clean_cache(registry.cache, needed | claimed, cache_dir, dry_run=dry_run),
    )


def _old_versions(registry: ModelRegistry, name: str, keep: int) -> list[Version]:
    kept = {*registry.aliases(name).values(), champion_before(registry.champion_history(name))}
    return [version for version in registry.versions(name)[:-keep] if version.number not in kept]


def _blobs_of(version: Version) -> set[str]:
    return {file.sha256 for variant in version.variants for file in variant.files}


def _clean_cache(cache: LocalObjectStore | None, needed: set[str], cache_dir: Path, *, dry_run: bool) -> int:
    """Remove cached files that no version needs, and trials of recipes that were not chosen."""
    freed = 0
    if cache:
        unneeded = [entry for entry in cache.entries(BLOBS) if entry.key.rpartition("/")[2] not in needed]
        unneeded += cache.leftovers(datetime.now(UTC) - WRITE_LEASE)
        freed += sum(entry.size_bytes for entry in unneeded)
        if not dry_run:
            cache.delete(entry.key for entry in unneeded)
    return freed + _remove(_trials(cache_dir), dry_run=dry_run)


def _clean_interrupted(settings: Settings, *, dry_run: bool) -> int:
    """Remove what killed runs, imports and servers left on this machine; returns the bytes."""
    cache_dir = settings.cache_dir
    found = old_leftovers_in(cache_dir / "work", WRITE_LEASE)
    for folder in (cache_dir / "serving", cache_dir / "inputs"):
        found += leftovers_in(folder)
    found += unfinished_in(settings.home_dir, WRITE_LEASE, without=settings.home_dir / "store")
    if not dry_run:
        with contextlib.suppress(StageFailed):  # a file that is not a server's; the commands that need it tell
            running_servers(settings.home_dir)
    return _remove(found, dry_run=dry_run)


def _remove(paths: Sequence[Path], *, dry_run: bool) -> int:
    size_bytes = sum(map(size_of, paths))
    if not dry_run:
        remove(paths)
    return size_bytes


def _trials(cache_dir: Path) -> list[Path]:
    """Return the folder of a search's trials, unless a search uses it."""
    folder = cache_dir / "trials"
    if not folder.is_dir() or claimed_blobs(ModelRegistry(LocalObjectStore(folder))):
        return []
    return [folder]


@stage("collect garbage", run_name="collect-garbage")
def collect_in_store(*, keep: int | None, dry_run: bool) -> Collection:
    """Run `collect` and show its progress."""
    with stage_progress("collect") as on_progress:
        return collect(workshop(), keep=keep, dry_run=dry_run, on_progress=on_progress)


@stage("report garbage", run_name="report-garbage")
def publish_collection(collection: Collection) -> None:
    """Post what was removed as a Prefect artifact."""
    rows = {
        "versions": ", ".join(collection.versions) or "-",
        "in use, kept": ", ".join(collection.in_use) or "-",
        "files": f"{collection.blobs:,}",
        "leftovers": f"{collection.leftovers:,}",
        "freed in the store": f"{collection.freed_bytes / 1e6:,.1f} MB",
        "freed on this machine": f"{collection.cached_bytes / 1e6:,.1f} MB",
        "kept for running work": f"{collection.spared_blobs:,} files",
    }
    table = [{"what": what, "removed": value} for what, value in rows.items()]
    with shown_in_prefect("What was removed"):
        create_table_artifact(table=table, key="slmops-gc", description=collection.summary)
    post_models(workshop().registry)
