"""The progress of a transfer, in bytes and bytes per second."""

import threading
import time
from collections.abc import Iterable
from typing import Protocol

from slmops.infra.process.call import OnProgress
from slmops.infra.storage.objects import OnBytes, no_report

REPORT_INTERVAL_S = 0.2  # a transfer would report thousands of times a second


class _Sized(Protocol):
    @property
    def size_bytes(self) -> int: ...


def byte_progress(on_progress: OnProgress | None, files: Iterable[_Sized], doing: str) -> OnBytes:
    """Return an `OnBytes` that reports to `on_progress` how many of the files' bytes were transferred, and how fast.

    `doing` is a verb such as `storing`.
    """
    total = sum(file.size_bytes for file in files)
    if on_progress is None or not total:
        return no_report
    lock = threading.Lock()
    began = time.monotonic()
    reported_at = began
    done = 0

    def report(moved: int) -> None:
        nonlocal done, reported_at
        with lock:
            done = min(done + moved, total)
            now = time.monotonic()
            if now - reported_at < REPORT_INTERVAL_S and done < total:
                return
            reported_at = now
            rate = done / max(now - began, 1e-3)
            on_progress(done, total, f"{doing}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:,.1f} MB/s")

    return report
