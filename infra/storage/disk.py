"""Free disk space, and errors of the disk."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
