"""Versions from one store to another: push, pull, and what import does after unpacking."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slmops.infra.errors import StageFailed
from slmops.infra.model_screening import GENAI_CONFIG, is_screened, screen_files
from slmops.infra.process.call import OnProgress
from slmops.infra.settings import StoreSettings
from slmops.infra.storage.evidence import DEPLOY, SELECTION, SIGNATURE
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, StoredFile
from slmops.infra.storage.model_files import blob_of
from slmops.infra.storage.origin import marked
from slmops.infra.storage.progress import byte_progress
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.infra.storage.signatures import check_signature, is_signed
from slmops.infra.storage.version import Version

AT_ONCE = 8


@dataclass(frozen=True)
class CopiedVersion:
    """The result of a copy: the version in the target, whether it is new there, and the bytes of its files."""

    version: Version
    is_new: bool
    moved_bytes: int
    skipped_bytes: int


def copy_version(
    version: Version,
    target: ModelRegistry,
    *,
    renumber: bool = False,
    on_progress: OnProgress | None = None,
    settings: StoreSettings | None = None,
) -> CopiedVersion:
    """Copy a version with its evidence into another store; content that is already there is not transferred.

    It keeps its number; with `renumber`, it takes the next free number if another version has its own. If the target
    has a version of the same identity, that is the copy, whatever its number. The copy becomes visible only after all
    its files are stored. The next copy completes an interrupted one.

    The copied evidence is only a claim of its origin, so it makes no champion. The copy becomes the champion
    only if it has a signature by the verification key of `settings`, its name has no champion, and it can be served.

    Raises `BadInput` for a number that is taken and for a model that is refused, `StageFailed` for files that are
    missing or altered in the source, `DamagedEvidence` for a record that cannot be read. Nothing is written then.
    """
    manifest, source = version.manifest, version.registry
    existing = target.same_version(manifest)
    renumber = renumber and existing is None
    if existing is None and not renumber:
        target.check_number(manifest)
    evidence = _read_evidence(version, known=_names_of(target.of(existing)) if existing else frozenset())
    _screen(manifest, source, on_progress)
    files = {blob_of(file): file for variant in manifest.variants for file in variant.files}
    try:
        missing = target.claim_files(files.values())
        _move([files[blob] for blob in missing], source, target, on_progress)
        added, is_new = target.add_version(existing or manifest, renumber=renumber)
    finally:
        target.release_files()
    stored = target.of(added)
    _write_evidence(evidence, version, stored)
    if settings and _is_trusted(stored, settings) and stored.serving:
        reason = "the first version of its name in this store, signed by a key that is trusted"
        target.set_alias(stored.name, CHAMPION, stored.number, reason, only_if_free=True)
    moved = sum(blob.size_bytes for blob in missing)
    return CopiedVersion(stored, is_new, moved, sum(blob.size_bytes for blob in files) - moved)


def _screen(manifest: Manifest, source: ModelRegistry, on_progress: OnProgress | None) -> None:
    """Raise `BadInput` for a model that no runtime may open; no runtime can open a variant that is not a model."""
    for variant in manifest.variants:
        files = {file.path: file for file in variant.files if "/" not in file.path}
        if GENAI_CONFIG not in files:
            continue
        try:
            here = source.local_files([file for name, file in files.items() if is_screened(name)], on_progress)
        except KeyError as error:
            raise _lost(error) from None
        screen_files({name: here.get(name, Path(name)) for name in files})


def _move(
    files: Sequence[StoredFile], source: ModelRegistry, target: ModelRegistry, on_progress: OnProgress | None
) -> None:
    here = {blob_of(file): source.local_file(file) for file in files}
    far = [blob for blob, path in here.items() if path is None]
    on_bytes = byte_progress(on_progress, here, "copying")
    cache = target.objects if isinstance(target.objects, LocalObjectStore) else source.cache
    if far and cache is None:
        raise StageFailed("The store has lost some of the version's files.", "slmops verify lists them.")
    try:
        if cache and far:
            source.objects.fetch_blobs([(blob, cache.blob_path(blob)) for blob in far], cache.aside, on_bytes)
            if cache is not target.objects:
                here |= {blob: cache.blob_path(blob) for blob in far}
        target.objects.put_blobs([(blob, path) for blob, path in here.items() if path], on_bytes)
    except KeyError as error:
        raise _lost(error) from None


def _lost(error: KeyError) -> StageFailed:
    return StageFailed(
        f"The store has lost {error.args[0]}.",
        "slmops verify lists all missing files; deploy the version again.",
        code="content-lost",
    )


def _names_of(version: Version) -> frozenset[str]:
    return frozenset(entry.key.removeprefix(version.evidence_key("")) for entry in version.evidence_entries())


def _read_evidence(version: Version, known: frozenset[str]) -> dict[str, bytes]:
    """Return each file of evidence as name -> bytes, without those that are `known` in the target.

    Raises `DamagedEvidence` for a file that is not a record of the version, and for records that another module cannot
    read.
    """
    version.latest(SELECTION)
    version.latest(DEPLOY)
    wanted = [entry for entry in version.evidence_entries() if entry.key[len(version.evidence_key("")) :] not in known]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(version.read_evidence, wanted)
        return {entry.key[len(version.evidence_key("")) :]: data for entry, data in zip(wanted, found, strict=True)}


def _write_evidence(evidence: Mapping[str, bytes], version: Version, stored: Version) -> None:
    """Append the evidence that the target does not have.

    Records point to the version under its number in the target, and are marked as copied.
    """
    known, same = _names_of(stored), version.manifest.digest == stored.manifest.digest
    kept = known if CHAMPION not in stored.aliases else known | _of_what_serves(evidence)

    def write(name: str) -> None:
        data = evidence[name]
        if name.endswith(".json"):
            data = marked(data, stored.manifest.digest, version.manifest.digest)
        stored.registry.objects.put_bytes(stored.evidence_key(name), data)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(write, (name for name in evidence if name not in kept and (same or _holds_for_another(name)))))


def _of_what_serves(names: Iterable[str]) -> frozenset[str]:
    """Return the kinds of evidence that decide which variant serves. Copied evidence must not change that."""
    return frozenset(name for name in names if name.partition("-")[0] in (SELECTION.name, DEPLOY.name))


def _holds_for_another(name: str) -> bool:
    """Whether evidence is valid under another number. A signature covers the number, and reports name it."""
    return name.endswith(".json") and not name.startswith(f"{SIGNATURE.name}-")


def _is_trusted(version: Version, settings: StoreSettings) -> bool:
    if settings.verification_key is None or not is_signed(version):
        return False
    with suppress(StageFailed):  # by another key, or altered
        check_signature(version, settings)
        return True
    return False
