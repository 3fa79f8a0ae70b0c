"""Free disk space, and errors of the disk."""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slmops.infra.errors import StageFailed


def check_room(needs: Iterable[tuple[Path, int]]) -> None:
    """Raise `StageFailed` if the disk of a folder (which may not exist yet) has less free space than needed."""
    taken: Counter[int] = Counter()
    for place, size_bytes in needs:
        folder = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
        device = folder.stat().st_dev
        taken[device] += size_bytes
        free = shutil.disk_usage(folder).free
        if free < taken[device]:
            raise StageFailed(
                f"The disk of {folder} has {free / 1e6:,.1f} MB free, and this takes {taken[device] / 1e6:,.1f} MB.",
                "Free disk space, or name a folder on another disk.",
                code="disk-full",
            )


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free


def folder_size(folder: Path) -> int:
    """Return the bytes of a folder's files; files with several names (hard links) count once."""
    sizes: dict[tuple[int, int], int] = {}
    for root, _, files in os.walk(folder):
        for file in files:
            with suppress(OSError):  # it was removed in the meantime
                found = os.stat(os.path.join(root, file), follow_symlinks=False)  # noqa: PTH116, PTH118  (many files)
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn errors of the disk into `StageFailed`; `what` is the part of the message before the reason."""
    try:
        yield
    except OSError as error:
        raise StageFailed(
            f"{what}: {error.strerror or error}.",
            "Check the disk's free space, and whether its file system allows files of this size.",
            code="disk-failed",
        ) from error
