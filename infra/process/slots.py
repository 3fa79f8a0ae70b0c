"""Locks between the processes of one home directory."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from slmops.infra.process.call import OnProgress

POLL_INTERVAL_S = 0.5


@contextmanager
def slot(folder: Path, count: int, on_progress: OnProgress | None = None) -> Iterator[None]:
    """Hold one of `count` slots; waits without limit for a free one.

    A slot is a lock. The operating system releases it when the process ends, for whatever reason.
    """
    locks = [FileLock(folder / f"{number}.lock") for number in range(count)]
    with _held(locks, "waiting for another build on this machine", on_progress):
        yield


@contextmanager
def only_maker(path: Path, on_progress: OnProgress | None = None) -> Iterator[None]:
    """Be the only process that makes the file or folder `path`; waits without limit for others.

    Check for `path` again inside the block: the other process may have made it. The lock is an empty file in the same
    folder.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    with _held([lock], "waiting for another run that makes the same file", on_progress):
        yield


@contextmanager
def _held(locks: Sequence[FileLock], waiting: str, on_progress: OnProgress | None) -> Iterator[None]:
    for lock in locks:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    while (acquired := _free(locks)) is None:
        if on_progress:
            on_progress(0, 1, waiting)
        time.sleep(POLL_INTERVAL_S)
    try:
        yield
    finally:
        acquired.release()


def _free(locks: Sequence[FileLock]) -> FileLock | None:
    for lock in locks:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        return lock
    return None
