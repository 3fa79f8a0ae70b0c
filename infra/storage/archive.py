"""Versions as single files, for machines without network: export writes a tar, import reads one that may be hostile.

An archive is an uncompressed tar of `models/NAME/3/manifest.json`, `models/NAME/3/evidence/<file>` and
`blobs/sha256/<64 hex>`, in this order, each kind sorted by name. A version and its evidence always give the same bytes,
and import accepts nothing else (`slmops.infra.storage.tar`).
"""

import errno
import hashlib
import itertools
import os
import re
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError
from pydantic_core import from_json

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foreign_files import open_regular
from slmops.infra.process.call import OnProgress
from slmops.infra.settings import StoreSettings
from slmops.infra.storage.copying import CopiedVersion, copy_version
from slmops.infra.storage.disk import check_room, disk_errors
from slmops.infra.storage.holders import name_prefix
from slmops.infra.storage.leftovers import leftovers_in, remove
from slmops.infra.storage.local import CHUNK_BYTES, LocalObjectStore
from slmops.infra.storage.manifest import Manifest, StoredFile, parse_foreign_manifest
from slmops.infra.storage.model_files import blob_of
from slmops.infra.storage.objects import Blob, OnBytes
from slmops.infra.storage.origin import unmarked
from slmops.infra.storage.progress import byte_progress
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.tar import TarReader, TarWriter, opened_tar, shown

MOST_MANIFEST_BYTES = 16 << 20
LONGEST_PATH = 1000  # characters
LONGEST_PATH_PART_BYTES = 255
MOST_EVIDENCE_BYTES = 64 << 20  # of one file
MOST_EVIDENCE_FILES = 10_000

EXPORT_ENDING = ".export"  # of what is written beside an archive that is not finished
_FULL = (errno.ENOSPC, errno.EDQUOT)
_EVIDENCE = re.compile(r"(?=.{1,200}$)[A-Za-z0-9][A-Za-z0-9._-]*\.(?:json|md|html)")
_RECORD_FIELDS = {"kind": str, "manifest": str, "recorded_at": str, "content": dict}


_DAMAGED = "slmops verify lists all damage; push the version again from a machine with an intact copy."


@dataclass(frozen=True)
class ExportedVersion:
    """An archive that was written: where, its size and its SHA-256 (hex)."""

    file: Path
    size_bytes: int
    sha256: str


def export_version(
    registry: ModelRegistry, manifest: Manifest, file: Path, on_progress: OnProgress | None = None
) -> ExportedVersion:
    """Write a version and its evidence into a new file atomically.

    All content is verified while it is written. Raises `BadInput` for a file that exists and for a read-only folder,
    `StageFailed` for a full disk and for content that is missing or altered in the store.
    """
    _check_target(file)
    blobs = _named_blobs(manifest)
    check_room([(file.parent, sum(blob.size_bytes for blob in blobs))])
    on_bytes = byte_progress(on_progress, blobs, "exporting")
    with _written_aside(file) as archive:
        for name, data in _manifest_and_evidence(registry, manifest):
            archive.add(name, len(data), [data])
        for blob in sorted(blobs, key=lambda blob: blob.key):
            what, stored = blobs[blob]
            with _on_this_machine(registry, stored, file.parent) as path:
                archive.add(blob.key, blob.size_bytes, _verified(path, blob, what, on_bytes))
        archive.end()
    return ExportedVersion(file, archive.size_bytes, archive.sha256)


def import_version(
    file: Path,
    registry: ModelRegistry,
    staging: Path,
    *,
    renumber: bool = False,
    on_progress: OnProgress | None = None,
    settings: StoreSettings | None = None,
) -> CopiedVersion:
    """Unpack and verify an archive, and then copy its version into a store as `copy_version` does.

    It is unpacked into a separate folder below `staging`, which is removed afterwards. That needs disk space for the
    archive, and in a local store on the same disk also for the new content. Raises `BadInput` for anything that
    `export_version` does not write and for a number that is taken, `StageFailed` for a disk without enough space.
    """
    with opened_tar(file) as archive, _new_folder(staging) as folder:
        staged = ModelRegistry(LocalObjectStore(folder))
        with disk_errors(f"{file} cannot be unpacked below {staging}"):
            manifest = _unpack(archive, staged, registry, folder, on_progress)
        return copy_version(
            staged.of(manifest), registry, renumber=renumber, on_progress=on_progress, settings=settings
        )


# Requirements of both export and import


def _manifest_key(manifest: Manifest) -> str:
    return f"models/{manifest.name}/{manifest.version}/manifest.json"


def _named_blobs(manifest: Manifest) -> dict[Blob, tuple[str, StoredFile]]:
    """Return each content of a version with the first file that has it and its name, such as `int4/model.onnx`."""
    blobs: dict[Blob, tuple[str, StoredFile]] = {}
    for variant in manifest.variants:
        for file in variant.files:
            blobs.setdefault(blob_of(file), (f"{variant.precision}/{file.path}", file))
    return blobs


def _fault_of_manifest(data: bytes, manifest: Manifest) -> str | None:
    """Return what is wrong with a valid manifest: its names become folders and files on other machines."""
    if len(data) > MOST_MANIFEST_BYTES:
        return f"has {len(data):,} bytes, and at most {MOST_MANIFEST_BYTES:,} are allowed"
    if data != manifest.to_bytes():
        return "is not written as slmops writes manifests"
    for variant in manifest.variants:
        bad = _unplaceable(file.path for file in variant.files)
        if bad is not None:
            return f"has a file {shown(bad)} that cannot be placed"
    sizes = Counter(blob.sha256 for blob in _named_blobs(manifest))
    bad = next((sha256 for sha256, count in sizes.items() if count > 1), None)
    return f"gives {bad} two sizes" if bad else None


def _unplaceable(paths: Iterable[str]) -> str | None:
    """Return a path that cannot be placed: it is invalid, a duplicate, or the parent folder of another path."""
    parts = sorted(path.split("/") for path in paths)
    for folders, after in itertools.pairwise([*parts, []]):
        path = "/".join(folders)
        fits = len(path) <= LONGEST_PATH and all(len(part.encode()) <= LONGEST_PATH_PART_BYTES for part in folders)
        if not fits or not path.isprintable() or {"", "."}.intersection(folders) or after[: len(folders)] == folders:
            return path
    return None


def _fault_of_evidence(name: str, data: bytes, digest: str) -> str | None:
    """Return what is wrong with a file of evidence: a record on the manifest with this digest (`.json`), or a text."""
    if not _EVIDENCE.fullmatch(name):
        return "is not a valid name of a record or a report"
    if len(data) > MOST_EVIDENCE_BYTES:
        return f"has {len(data):,} bytes, and at most {MOST_EVIDENCE_BYTES:,} are allowed"
    try:
        if name.endswith(".json"):
            return _fault_of_record(from_json(data, allow_inf_nan=False), digest)
        data.decode()
    except ValueError as error:
        return f"is not {'JSON' if name.endswith('.json') else 'UTF-8'} ({error})"
    return None


def _fault_of_record(record: object, digest: str) -> str | None:
    if not isinstance(record, dict) or not all(isinstance(record.get(key), of) for key, of in _RECORD_FIELDS.items()):
        return f"is not a record, which has {', '.join(_RECORD_FIELDS)}"
    if record["kind"] == "deploy" and not _has_statuses(record["content"]):
        return "is the record of a deploy without the status of its variants"
    if record["manifest"] != digest:
        return f"is on another manifest, {shown(record['manifest'])}: this one's SHA-256 is {digest}"
    return None


def _has_statuses(content: dict[str, object]) -> bool:
    """Whether the record of a deploy has the fields that `copy_version` reads."""
    variants = content.get("variants")
    return isinstance(variants, list) and all(isinstance(variant, dict) and "status" in variant for variant in variants)


# Writing


def _check_target(file: Path) -> None:
    if os.path.lexists(file):
        raise BadInput(f"{file} exists already.", "Name another file, or remove it.", code="archive-exists")
    if not file.parent.is_dir():
        raise BadInput(
            f"There is no folder {file.parent}.", "Name a file in an existing folder.", code="folder-missing"
        )


@contextmanager
def _written_aside(file: Path) -> Iterator[TarWriter]:
    remove(leftovers_in(file.parent, EXPORT_ENDING))  # of exports that were killed
    aside = file.parent / f".{name_prefix()}{uuid.uuid4().hex}{EXPORT_ENDING}"
    try:
        stream = aside.open("xb")
    except OSError as error:
        kind = StageFailed if error.errno in _FULL else BadInput
        raise kind(
            f"{file.parent} cannot be written to: {error.strerror or error}.",
            "Name a file in another folder.",
            code="folder-not-writable",
        ) from error
    try:
        with disk_errors(f"{file} cannot be written"):
            with stream:
                yield TarWriter(stream)
            _check_target(file)  # another export may have made the file meanwhile
            aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _manifest_and_evidence(registry: ModelRegistry, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Yield the names of members and their stored bytes.

    Raises `StageFailed` for anything that import would refuse.
    """
    version = registry.of(manifest)
    evidence = version.evidence_key("")
    try:
        data = version.stored_manifest()
        _refuse(manifest, "manifest", _fault_of_manifest(data, manifest))
        yield _manifest_key(manifest), data
        digest = manifest.digest
        names = sorted(entry.key.removeprefix(evidence) for entry in version.evidence_entries())
        if len(names) > MOST_EVIDENCE_FILES:
            raise StageFailed(
                f"{manifest.reference} has {len(names):,} files of evidence; the limit is {MOST_EVIDENCE_FILES:,}.",
                "Push it to a store instead.",
                code="evidence-too-much",
            )
        for name in names:
            data = unmarked(registry.objects.read_bytes(evidence + name))
            _refuse(manifest, f"evidence {shown(name)}", _fault_of_evidence(name, data, digest))
            yield evidence + name, data
    except KeyError as error:
        raise StageFailed(f"The store no longer has {error.args[0]}.", _DAMAGED, code="content-lost") from None


def _refuse(manifest: Manifest, what: str, fault: str | None) -> None:
    if fault:
        raise StageFailed(
            f"{manifest.reference} cannot be exported: its {what} {fault}.", _DAMAGED, code="version-not-exportable"
        )


@contextmanager
def _on_this_machine(registry: ModelRegistry, file: StoredFile, parent: Path) -> Iterator[Path]:
    """Yield a local file with the stored content; raises `StageFailed` if the store has lost it."""
    here = registry.local_file(file)
    if here:
        yield here
        return
    with TemporaryDirectory(
        dir=parent, prefix=f".{name_prefix()}", suffix=EXPORT_ENDING, ignore_cleanup_errors=True
    ) as folder:
        registry.materialize([file], Path(folder) / "files")
        yield Path(folder) / "files" / file.path


def _verified(path: Path, blob: Blob, what: str, on_bytes: OnBytes) -> Iterator[bytes]:
    """Yield a file's bytes; raises `StageFailed`, at the latest after the last byte, if they do not match the blob."""
    found = hashlib.sha256()
    size_bytes = 0
    try:
        with open_regular(path) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                found.update(chunk)
                size_bytes += len(chunk)
                yield chunk
                on_bytes(len(chunk))
    except OSError as error:
        raise StageFailed(
            f"{what} cannot be read: {error.strerror or error} ({path}).", _DAMAGED, code="content-unreadable"
        ) from error
    if (found.hexdigest(), size_bytes) != (blob.sha256, blob.size_bytes):
        raise StageFailed(
            f"{what} was altered: the SHA-256 of {path} is {found.hexdigest()}, not {blob.sha256}.",
            _DAMAGED,
            code="content-altered",
        )


# Reading


@contextmanager
def _new_folder(staging: Path) -> Iterator[Path]:
    with disk_errors(f"{staging} cannot be written to"):
        staging.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(dir=staging, prefix=name_prefix(), ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


def _unpack(
    archive: TarReader, staged: ModelRegistry, target: ModelRegistry, folder: Path, on_progress: OnProgress | None
) -> Manifest:
    """Verify an archive, put its version into the staged store and return it."""
    manifest = _read_manifest(archive)
    blobs = _named_blobs(manifest)
    _check_sizes(archive, blobs, folder, target)
    on_bytes = byte_progress(on_progress, blobs, "unpacking")
    evidence = staged.of(manifest).evidence_key("")
    digest = manifest.digest
    left = {blob.key: blob for blob in blobs}
    records = 0
    last = (False, "")
    while member := archive.next():
        place = (not member.name.startswith(evidence), member.name)
        if place <= last:
            raise archive.refusal(member.name, "comes twice or out of order")
        last = place
        if member.name.startswith(evidence):
            records += 1
            if records > MOST_EVIDENCE_FILES:
                raise archive.refusal(member.name, f"exceeds the limit of {MOST_EVIDENCE_FILES:,} records")
            _unpack_evidence(archive, member, member.name.removeprefix(evidence), digest, staged)
        elif blob := left.pop(member.name, None):
            _unpack_blob(archive, member, blob, folder, on_bytes)
        else:
            raise archive.refusal(member.name, f"does not belong to {manifest.reference}")
    for blob in left.values():
        raise archive.refusal(blobs[blob][0], f"({blob.key}) is not in it")
    staged.objects.put_bytes(_manifest_key(manifest), manifest.to_bytes())
    return manifest


def _read_manifest(archive: TarReader) -> Manifest:
    member = archive.next()
    name = member.name if member else "it"
    if member is None or not name.endswith("/manifest.json"):
        raise archive.refusal(name, "does not begin with a manifest" if member is None else "comes before the manifest")
    data = archive.content(member, MOST_MANIFEST_BYTES)
    try:
        manifest = parse_foreign_manifest(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise archive.refusal(name, f"is not valid: {shown(where)}: {first['msg']:.200}") from None
    except ValueError as error:
        raise archive.refusal(name, f"is not valid: {error}") from None
    fault = _fault_of_manifest(data, manifest)
    if fault is None and name != _manifest_key(manifest):
        fault = f"is the manifest of {manifest.reference}"
    if fault:
        raise archive.refusal(name, fault)
    return manifest


def _check_sizes(archive: TarReader, blobs: Iterable[Blob], folder: Path, target: ModelRegistry) -> None:
    """Raise `BadInput` for an archive that is smaller than its files, `StageFailed` for too little disk space.

    The unpacked files are never larger than the archive.
    """
    size_bytes = sum(blob.size_bytes for blob in blobs)
    if size_bytes > archive.size_bytes:
        raise archive.refusal("its manifest", f"names more bytes than the whole archive has ({archive.size_bytes:,})")
    needs = [(folder, archive.size_bytes)]
    if isinstance(target.objects, LocalObjectStore):
        missing = target.objects.missing(blobs)
        needs.append((target.objects.aside, sum(blob.size_bytes for blob in missing)))
    check_room(needs)


def _unpack_evidence(
    archive: TarReader, member: tarfile.TarInfo, name: str, digest: str, staged: ModelRegistry
) -> None:
    data = archive.content(member, MOST_EVIDENCE_BYTES)
    fault = _fault_of_evidence(name, data, digest)
    if fault:
        raise archive.refusal(member.name, fault)
    staged.objects.put_bytes(member.name, data)


def _unpack_blob(archive: TarReader, member: tarfile.TarInfo, blob: Blob, folder: Path, on_bytes: OnBytes) -> None:
    if member.size != blob.size_bytes:
        fault = f"has {member.size:,} bytes by its header, and {blob.size_bytes:,} by the manifest"
        raise archive.refusal(member.name, fault)
    store = LocalObjectStore(folder)
    store.aside.mkdir(exist_ok=True)
    under_way = store.aside / blob.sha256
    found = hashlib.sha256()
    with under_way.open("xb") as target:
        for chunk in archive.chunks(member):
            found.update(chunk)
            target.write(chunk)
            on_bytes(len(chunk))
    if found.hexdigest() != blob.sha256:
        raise archive.refusal(member.name, f"was altered: its SHA-256 is {found.hexdigest()}")
    store.adopt_blob(blob, under_way)
