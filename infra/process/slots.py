"""How much heavy work runs at once under one home directory, over all its processes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from slmops.infra.process.call import OnProgress

POLL_INTERVAL_S = 0.5


@contextmanager
def slot(folder: Path, count: int, on_progress: OnProgress | None = None) -> Iterator[None]:
    """Hold one of `count` slots, waiting for a free one as long as it takes.

    A slot is a lock that the operating system takes back when its process ends, however that comes about.
    """
    folder.mkdir(parents=True, exist_ok=True)
    locks = [FileLock(folder / f"{number}.lock") for number in range(count)]
    while (held := _free(locks)) is None:
        if on_progress:
            on_progress(0, 1, "waiting for another build on this machine")
        time.sleep(POLL_INTERVAL_S)
    try:
        yield
    finally:
        held.release()


def _free(locks: list[FileLock]) -> FileLock | None:
    for lock in locks:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        return lock
    return None
