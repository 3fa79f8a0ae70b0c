"""Leftovers of killed processes outside of a store: temporary files and folders that are named after their process."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from slmops.infra.storage.holders import has_ended, holder_of, is_lost, temporary_name

ASIDE_ENDING = ".aside"
# The names of `temporary_name` with an ending, and those of files of earlier releases, which name no process.
UNFINISHED = re.compile(r"\.([0-9a-f]{16}~[0-9]+~[0-9a-f]+-)?[0-9a-f]{32}\.(part|aside)")


def leftovers_in(folder: Path, ending: str = "") -> list[Path]:
    """Return the files and folders directly in a folder, with this ending, whose process has certainly ended."""
    found = sorted(folder.glob(f"*{ending}")) if folder.is_dir() else []
    return [path for path in found if has_ended(holder_of(path.name))]


def old_leftovers_in(folder: Path, term: timedelta) -> list[Path]:
    """Return also those of which the process is not known, and that were not changed for longer than `term`."""
    return [path for path in sorted(folder.iterdir()) if _is_old(path, term)] if folder.is_dir() else []


def unfinished_in(home: Path, term: timedelta, without: Path) -> list[Path]:
    """Return the files and folders anywhere below `home`, except below `without`, that killed processes did not finish.

    One of a process of another machine, or of an unknown one, must not have been changed for longer than `term`.
    """
    found = []
    for folder, folders, files in os.walk(home):
        unfinished = [name for name in (*folders, *files) if UNFINISHED.fullmatch(name)]
        found += [path for name in unfinished if _is_old(path := Path(folder, name), term)]
        folders[:] = [name for name in folders if name not in unfinished and Path(folder, name) != without]
    return found


@contextmanager
def made_aside(target: Path) -> Iterator[Path]:
    """Yield the path of a file or folder to make and to move to `target`, in the same folder; what stays is removed.

    Also what killed processes left there.
    """
    remove(leftovers_in(target.parent, ASIDE_ENDING))
    aside = target.with_name(temporary_name(ASIDE_ENDING))
    try:
        yield aside
    finally:
        remove([aside])


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of the files below a folder."""
    files = (path,) if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def _is_old(path: Path, term: timedelta) -> bool:
    with contextlib.suppress(FileNotFoundError):  # its process has removed it meanwhile
        age = timedelta(seconds=time.time() - path.lstat().st_mtime)
        return is_lost(holder_of(path.name), age, term)
    return False


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders as far as possible; what stays is found again."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
