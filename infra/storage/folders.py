"""Folders under the home directory: temporary work folders, and results that appear atomically."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from filelock import ReadWriteLock, Timeout

from slmops.infra.foreign_files import check_regular
from slmops.infra.process.call import OnProgress
from slmops.infra.process.slots import only_maker
from slmops.infra.storage.holders import move_to, name_prefix

if TYPE_CHECKING:  # child processes move folders too, without any settings
    from slmops.infra.settings import Settings


@contextmanager
def work_folder(settings: "Settings") -> Iterator[Path]:
    """Yield an empty folder under the cache; it is removed at the end, also after an error."""
    root = settings.cache_dir / "work"
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=name_prefix(), ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def place(folder: Path, target: Path) -> None:
    """Move a finished folder to its place; a folder that another process placed there first stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not target.is_dir():
            move_to(folder, target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def made_once(target: Path, settings: "Settings", on_progress: OnProgress | None = None) -> Iterator[Path | None]:
    """Yield the path of a folder to make, which is then moved to `target`; None if `target` exists.

    One process makes it while others wait. The folder is made in a temporary parent folder, so an exception leaves
    nothing.
    """
    with only_maker(target, on_progress):
        if target.is_dir():
            yield None
            return
        with work_folder(settings) as work:
            yield work / "made"
            place(work / "made", target)


@contextmanager
def shared_folder(folder: Path) -> Iterator[None]:
    """Share a folder, which need not exist yet, between processes; its last user removes it.

    A user that leaves by an exception removes nothing: the next attempt can reuse expensive content. The locks are
    on an empty file in the parent folder; the operating system releases those of a process that dies.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = ReadWriteLock(folder.with_name(f"{folder.name}.users"), is_singleton=False)
    try:
        with lock.read_lock():
            yield
        with contextlib.suppress(Timeout), lock.write_lock(blocking=False):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.close()


def link_or_copy(source: Path, target: Path, *, symbolic: bool = True) -> None:
    """Make `target` a hard link to `source`, a symbolic link if allowed, or a copy: the first that is possible.

    On file systems with that feature (btrfs, XFS), the copy shares its blocks. Raises `FileNotFoundError` and
    `FileExistsError` as `os.link` does, `NotRegularFile` for a pipe or a device, which no reader of `target` expects.
    """
    check_regular(source)
    make: Callable[[Path, Path], None]
    for make in (os.link, os.symlink) if symbolic else (os.link,):
        try:
            make(source.resolve(strict=True), target)
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError:  # another file system, or one without such links
            continue
        return
    _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError), source.open("rb") as stream, target.open("xb") as copy:
            left = os.fstat(stream.fileno()).st_size
            while left > 0 and (moved := os.copy_file_range(stream.fileno(), copy.fileno(), left)):
                left -= moved
            if left == 0:
                return
    shutil.copyfile(source, target)
