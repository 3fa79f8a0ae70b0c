"""A store of objects in a local folder."""

import contextlib
import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from slmops.infra.errors import StageFailed
from slmops.infra.foreign_files import NotRegularFile, open_regular
from slmops.infra.storage.folders import link_or_copy
from slmops.infra.storage.holders import holder_of, is_lost, move_to, name_prefix, protect_from_writing
from slmops.infra.storage.objects import Blob, Entry, OnBytes, no_report

ASIDE = "aside"  # unfinished objects; on the store's own file system, so that a rename is atomic
CHUNK_BYTES = 1 << 20
# Of Linux, macOS and Windows, for a file system that has none.
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class LocalObjectStore:
    """`ObjectStore` in a folder: files are written aside, flushed to disk, then renamed; blobs are read-only."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def aside(self) -> Path:
        """The folder for unfinished files on the store's file system."""
        return self._root / ASIDE

    def blob_path(self, blob: Blob) -> Path:
        """Return where a blob's file is, or would be."""
        return self._path(blob.key)

    def check(self, *, by_writing: bool = False) -> None:
        """See `ObjectStore.check`."""
        nearest = next(folder for folder in (self._root, *self._root.parents) if folder.exists())
        if not nearest.is_dir():
            raise StageFailed(
                f"The store {self._root} cannot be used: {nearest} is a file.",
                "Name another with SLMOPS_STORE__URI.",
                code="store-is-file",
            )
        if by_writing and not os.access(nearest, os.W_OK):
            raise StageFailed(
                f"The store {self._root} cannot be written to.", "Check its permissions, or name another."
            )

    def notices(self) -> tuple[str, ...]:
        """See `ObjectStore.notices`."""
        return ()

    def missing(self, blobs: Iterable[Blob]) -> list[Blob]:
        """See `ObjectStore.missing`."""
        return [blob for blob in blobs if self._size_bytes(blob.key) != blob.size_bytes]

    def put_blobs(self, files: Sequence[tuple[Blob, Path]], on_bytes: OnBytes = no_report) -> None:
        """See `ObjectStore.put_blobs`."""
        for blob, source in files:
            self._put_blob(blob, source, on_bytes)

    def _put_blob(self, blob: Blob, source: Path, on_bytes: OnBytes) -> None:
        with self._reported(blob.key), self._aside() as target:
            found = hashlib.sha256()
            with open_regular(source) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    found.update(chunk)
                    target.write(chunk)
                    on_bytes(len(chunk))
            if found.hexdigest() != blob.sha256:
                raise StageFailed(
                    f"{source} was altered: its SHA-256 is {found.hexdigest()}, not {blob.sha256}.",
                    "Copy it again from its origin.",
                )
            flush_to_disk(target)
            target.close()
            self.adopt_blob(blob, Path(target.name))

    def adopt_blob(self, blob: Blob, file: Path) -> None:
        """Move a file of the store's own file system into the store as a blob; its content must have been verified."""
        path = self._path(blob.key)
        with self._reported(blob.key):
            path.parent.mkdir(parents=True, exist_ok=True)
            protect_from_writing(file)
            move_to(file, path)

    def fetch_blobs(self, files: Sequence[tuple[Blob, Path]], aside: Path, on_bytes: OnBytes = no_report) -> None:
        """See `ObjectStore.fetch_blobs`."""
        for blob, destination in files:
            with self._reported(blob.key):
                destination.parent.mkdir(parents=True, exist_ok=True)
                aside.mkdir(parents=True, exist_ok=True)
                under_way = aside / f"{name_prefix()}{uuid.uuid4().hex}"
                try:
                    link_or_copy(self._path(blob.key), under_way, symbolic=False)
                    under_way.replace(destination)
                finally:
                    under_way.unlink(missing_ok=True)
            on_bytes(blob.size_bytes)

    def digests(self, blobs: Iterable[Blob], on_bytes: OnBytes = no_report) -> Iterator[tuple[Blob, str | None, int]]:
        """See `ObjectStore.digests`."""
        for blob in blobs:
            found = hashlib.sha256()
            size_bytes = 0
            try:
                with self._reported(blob.key), open_regular(self._path(blob.key)) as stream:
                    while chunk := stream.read(CHUNK_BYTES):
                        found.update(chunk)
                        size_bytes += len(chunk)
                        on_bytes(len(chunk))
            except KeyError:
                yield blob, None, 0
            else:
                yield blob, found.hexdigest(), size_bytes

    def put_bytes(self, key: str, data: bytes) -> None:
        """See `ObjectStore.put_bytes`."""
        path = self._path(key)
        with self._reported(key), self._written_aside(path, data) as aside:
            move_to(aside, path)

    def put_bytes_if_absent(self, key: str, data: bytes) -> bool:
        """See `ObjectStore.put_bytes_if_absent`."""
        path = self._path(key)
        with self._reported(key), self._written_aside(path, data) as aside:
            try:
                _make_new(path, aside, data)
            except FileExistsError:
                with open_regular(path) as stream:
                    return stream.read() == data
        return True

    def read_bytes(self, key: str) -> bytes:
        """See `ObjectStore.read_bytes`."""
        with self._reported(key), open_regular(self._path(key)) as stream:
            return stream.read()

    def entries(self, folder: str) -> Iterator[Entry]:
        """See `ObjectStore.entries`."""
        root = self._path(folder)
        for path in sorted(root.rglob("*")) if root.is_dir() else []:
            with contextlib.suppress(FileNotFoundError):  # it was removed after it was listed
                yield from self._entry(path, path.relative_to(self._root).as_posix())

    def _entry(self, path: Path, key: str) -> Iterator[Entry]:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            yield Entry(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def delete(self, keys: Iterable[str]) -> None:
        """See `ObjectStore.delete`."""
        for key in keys:
            path = self._path(key)
            with self._reported(key), contextlib.suppress(FileNotFoundError):
                path.unlink()

    def leftovers(self, older_than: datetime) -> list[Entry]:
        """See `ObjectStore.leftovers`: temporary files whose process has ended, or that are old."""
        entries = self.entries(ASIDE)
        return [
            entry for entry in entries if is_lost(holder_of(entry.key), older_than - entry.modified_at, timedelta())
        ]

    def remove_leftovers(self, found: Iterable[Entry]) -> None:
        """See `ObjectStore.remove_leftovers`."""
        self.delete(entry.key for entry in found)

    def uri(self, key: str) -> str:
        """See `ObjectStore.uri`."""
        return self._path(key).as_uri()

    def _size_bytes(self, key: str) -> int | None:
        try:
            with self._reported(key):
                return self._path(key).stat().st_size
        except KeyError:
            return None

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
            raise ValueError(f"{key!r} is not a key")
        return self._root.joinpath(*parts)

    @contextmanager
    def _aside(self) -> Iterator[IO[bytes]]:
        self.aside.mkdir(parents=True, exist_ok=True)
        # Not a `NamedTemporaryFile`, which its user alone may read: a team's store follows the umask and the folders.
        path = self.aside / f"{name_prefix()}{uuid.uuid4().hex}"
        try:
            with path.open("xb") as aside:
                yield aside
        finally:  # also if a full disk does not take the rest at the end
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    @contextmanager
    def _written_aside(self, path: Path, data: bytes) -> Iterator[Path]:
        """Yield a temporary file with the data for `path`; it is removed if it is not moved there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._aside() as aside:
            aside.write(data)
            flush_to_disk(aside)
            aside.close()
            yield Path(aside.name)

    @contextmanager
    def _reported(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:
            raise self._failed(key, error) from error

    def _failed(self, key: str, error: OSError) -> StageFailed:
        fault, failed = error.strerror or str(error), error.filename2 or error.filename
        path = Path(os.fsdecode(failed)) if isinstance(failed, str | bytes) else self._root
        if not path.is_relative_to(self._root):  # where a file of the store was to be placed
            advice = "Check that folder's free space and permissions, or set SLMOPS_HOME to another folder."
            return StageFailed(f"{path} cannot be written: {fault}.", advice, code="disk-failed")
        advice = (
            "Remove it from the store."
            if isinstance(error, NotRegularFile)
            else "Check its free space and permissions, or name another with SLMOPS_STORE__URI."
        )
        return StageFailed(f"The store {self._root} cannot be used: {fault} ({key}).", advice, code="disk-failed")


def _make_new(path: Path, aside: Path, data: bytes) -> None:
    """Make a file of the data that a file `aside` has; raises `FileExistsError`.

    It appears whole, except on a disk without hard links (exFAT, some network drives): a reader or a crash may find a
    part of it there.
    """
    try:
        os.link(aside, path)  # unlike a rename, a link never replaces an existing file
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        with path.open("xb") as made:
            made.write(data)
            flush_to_disk(made)


def flush_to_disk(stream: IO[bytes]) -> None:
    """Flush a file's content to the disk."""
    stream.flush()
    os.fsync(stream.fileno())
