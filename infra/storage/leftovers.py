"""Leftovers of killed processes outside of a store: temporary files and folders that are named after their process."""

import contextlib
import shutil
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

from slmops.infra.storage.holders import has_ended, holder_of, is_lost


def leftovers_in(folder: Path, ending: str = "") -> list[Path]:
    """Return the files and folders directly in a folder, with this ending, whose process has certainly ended."""
    found = sorted(folder.glob(f"*{ending}")) if folder.is_dir() else []
    return [path for path in found if has_ended(holder_of(path.name))]


def old_leftovers_in(folder: Path, term: timedelta) -> list[Path]:
    """Return also those of which the process is not known, and that were not changed for longer than `term`."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        with contextlib.suppress(FileNotFoundError):  # its process has removed it meanwhile
            age = timedelta(seconds=time.time() - path.stat().st_mtime)
            if is_lost(holder_of(path.name), age, term):
                found.append(path)
    return found


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of the files below a folder."""
    files = (path,) if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders as far as possible; what stays is found again."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
