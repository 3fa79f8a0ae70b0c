"""Versions from one store to another: push, pull, and what import does after unpacking."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from slmops.infra.errors import StageFailed
from slmops.infra.process.call import OnProgress
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, StoredFile
from slmops.infra.storage.progress import byte_progress
from slmops.infra.storage.registry import CHAMPION, SIGNATURE, ModelRegistry, blob_of

AT_ONCE = 8


@dataclass(frozen=True)
class CopiedVersion:
    """What a copy did: the version as the target has it, whether it is new there, and the bytes of its files."""

    manifest: Manifest
    is_new: bool
    moved_bytes: int
    skipped_bytes: int


def copy_version(
    manifest: Manifest,
    source: ModelRegistry,
    target: ModelRegistry,
    *,
    renumber: bool = False,
    on_progress: OnProgress | None = None,
) -> CopiedVersion:
    """Copy a version with its evidence into another store; what is there is not moved again.

    It keeps its number, or with `renumber` takes the next free one where its own is another version's. A version of
    the same identity that the target has already is that version, whatever its number. It is seen there only once
    all its files are, and becomes the champion of a name that has none, if it can be served. A copy that broke off is
    completed by the next one.

    Raises `BadInput` for a number that is taken, `StageFailed` for files that the source has lost or altered.
    """
    existing = target.same_version(manifest)
    renumber = renumber and existing is None
    if existing is None and not renumber:
        target.check_number(manifest)
    files = {blob_of(file): file for variant in manifest.variants for file in variant.files}
    try:
        missing = target.claim_files(files.values())
        _move([files[blob] for blob in missing], source, target, on_progress)
        stored, is_new = target.add_version(existing or manifest, renumber=renumber)
    finally:
        target.release_files()
    _copy_evidence(manifest, source, stored, target)
    if _can_be_served(stored, target):
        reason = "the first version of its name in this store"
        target.set_alias(stored.name, CHAMPION, stored.version, reason, only_if_free=True)
    moved = sum(blob.size_bytes for blob in missing)
    return CopiedVersion(stored, is_new, moved, sum(blob.size_bytes for blob in files) - moved)


def _move(
    files: Sequence[StoredFile], source: ModelRegistry, target: ModelRegistry, on_progress: OnProgress | None
) -> None:
    here = {blob_of(file): source.local_file(file) for file in files}
    far = [blob for blob, path in here.items() if path is None]
    on_bytes = byte_progress(on_progress, here, "copying")
    cache = target.objects if isinstance(target.objects, LocalObjectStore) else source.cache
    if far and cache is None:
        raise StageFailed("The store has lost some of the version's files.", "See with slmops verify which.")
    try:
        if cache and far:
            source.objects.fetch_blobs([(blob, cache.blob_path(blob)) for blob in far], cache.aside, on_bytes)
            if cache is not target.objects:
                here |= {blob: cache.blob_path(blob) for blob in far}
        target.objects.put_blobs([(blob, path) for blob, path in here.items() if path], on_bytes)
    except KeyError as error:
        raise StageFailed(
            f"The store has lost {error.args[0]}.", "See with slmops verify what else, and deploy the version again."
        ) from None


def _copy_evidence(manifest: Manifest, source: ModelRegistry, stored: Manifest, target: ModelRegistry) -> None:
    """Append the evidence that the target does not have; records point to the version as it is called there."""
    prefix = len(source.evidence_key(manifest, ""))
    known = {entry.key[len(target.evidence_key(stored, "")) :] for entry in target.evidence_entries(stored)}
    names = [entry.key[prefix:] for entry in source.evidence_entries(manifest)]
    same = manifest.digest == stored.digest
    wanted = [name for name in names if name not in known and (same or _holds_for_another_number(name))]

    def copy(name: str) -> None:
        data = source.objects.read_bytes(source.evidence_key(manifest, name))
        if not same:
            record = {**json.loads(data), "manifest": stored.digest, "copied_from": manifest.digest}
            data = (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
        target.objects.put_bytes(target.evidence_key(stored, name), data)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(copy, wanted))


def _holds_for_another_number(name: str) -> bool:
    """Whether evidence is of the content alone: a signature covers the number, and reports are texts that name it."""
    return name.endswith(".json") and not name.startswith(f"{SIGNATURE}-")


def _can_be_served(manifest: Manifest, registry: ModelRegistry) -> bool:
    deployed = registry.latest_evidence(manifest, "deploy") or {}
    return any(variant.get("status") == "registered" for variant in deployed.get("variants", []))
