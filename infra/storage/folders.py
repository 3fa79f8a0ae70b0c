"""Folders under the home directory: work that disappears, results that appear whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from infra.settings import Settings


@contextmanager
def work_folder(settings: Settings) -> Iterator[Path]:
    """Yield an empty folder under the cache; it is removed at the end, however that comes about."""
    root = settings.cache_dir / "work"
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def place(folder: Path, target: Path) -> None:
    """Move a finished folder to where it is looked for; one that another process placed there first stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, a symbolic link, or a copy: the first that the file systems allow."""
    for make in (os.link, os.symlink):
        with contextlib.suppress(OSError):
            make(source.resolve(), target)
            return
    shutil.copyfile(source, target)
