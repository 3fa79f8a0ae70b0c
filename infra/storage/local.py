"""A store of objects in a local folder."""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

from filelock import FileLock, Timeout

from infra.errors import PassingFault, StageFailed

ASIDE = "aside"  # objects under way; on the store's own file system, so that a rename is atomic
LOCK_TIMEOUT_S = 300


class LocalObjectStore:
    """`ObjectStore` in a folder: written aside, flushed to disk, then renamed; blobs are read-only files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put_file(self, key: str, source: Path) -> None:
        """See `ObjectStore.put_file`."""
        stored = self.size_bytes(key)
        if stored == source.stat().st_size:
            return
        if stored is not None:
            self.delete(key)  # damaged; Windows replaces no read-only file
        with self._writing(key) as target, source.open("rb") as stream:
            shutil.copyfileobj(stream, target, 1 << 20)
            # A model folder may be a hard link to this file: whoever writes there must not alter the store.
            Path(target.name).chmod(stat.S_IREAD | stat.S_IRGRP | stat.S_IROTH)

    def put_bytes(self, key: str, data: bytes) -> None:
        """See `ObjectStore.put_bytes`."""
        with self._writing(key) as target:
            target.write(data)

    def put_bytes_if_absent(self, key: str, data: bytes) -> bool:
        """See `ObjectStore.put_bytes_if_absent`."""
        path = self._path(key)
        with self._reported(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._aside() as aside:
                aside.write(data)
                _flush_to_disk(aside)
                try:
                    os.link(aside.name, path)  # unlike a rename, a link never replaces what is there
                except FileExistsError:
                    return False
        return True

    def read_bytes(self, key: str) -> bytes:
        """See `ObjectStore.read_bytes`."""
        with self._reported(key):
            return self._path(key).read_bytes()

    def size_bytes(self, key: str) -> int | None:
        """See `ObjectStore.size_bytes`."""
        try:
            with self._reported(key):
                return self._path(key).stat().st_size
        except KeyError:
            return None

    def fetch_file(self, key: str, destination: Path) -> None:
        """See `ObjectStore.fetch_file`."""
        with self._reported(key):
            destination.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._path(key), destination)
            except (FileNotFoundError, FileExistsError):
                raise
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(self._path(key), destination)

    def keys(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore.keys`."""
        folder = self._root / prefix
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if path.is_file():
                yield path.relative_to(self._root).as_posix()

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        path = self._path(key)
        with self._reported(key), contextlib.suppress(FileNotFoundError):
            if os.name == "nt":  # Windows refuses to delete a read-only file
                path.chmod(stat.S_IWRITE)
            path.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `ObjectStore.lock`."""
        with self._reported("lock"):
            self._root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._root / "lock", timeout=LOCK_TIMEOUT_S):
                yield
        except Timeout:
            raise PassingFault(
                f"The store {self._root} was locked by another process for more than {LOCK_TIMEOUT_S} s.",
                "Let that deploy or delete end, then try again.",
            ) from None

    def uri(self, key: str) -> str:
        """See `ObjectStore.uri`."""
        return self._path(key).as_uri()

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
            raise ValueError(f"{key!r} is not a key")
        return self._root.joinpath(*parts)

    @contextmanager
    def _writing(self, key: str) -> Iterator[IO[bytes]]:
        path = self._path(key)
        with self._reported(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._aside() as aside:
                yield aside
                _flush_to_disk(aside)
                aside.close()
                Path(aside.name).replace(path)

    @contextmanager
    def _aside(self) -> Iterator[IO[bytes]]:
        folder = self._root / ASIDE
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, delete=False) as aside:
            try:
                yield aside
            finally:
                aside.close()
                Path(aside.name).unlink(missing_ok=True)

    @contextmanager
    def _reported(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:
            raise StageFailed(
                f"The store {self._root} cannot be used: {error.strerror or error} ({key}).",
                "Check its free space and permissions, or name another with SLMOPS_STORE__URI.",
            ) from error


def _flush_to_disk(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
