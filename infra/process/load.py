"""The CPU that other programs of the machine use during a measurement."""

import contextlib
import os
import time

import psutil

# psutil's separate counters; their sum is the time in which a core was busy.
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")


class OtherLoad:
    """The CPU that other programs use within this context.

    This is the machine's CPU time without that of this process and of its parent, which shows the progress.
    """

    def __init__(self) -> None:
        self.cores = 0.0  # that others kept busy, on average

    def __enter__(self) -> "OtherLoad":
        self._before = self._times()
        return self

    def __exit__(self, *_: object) -> None:
        before, after = self._before, self._times()
        wall_s, busy_s, own_s = (now - then for then, now in zip(before, after, strict=True))
        self.cores = max(0.0, busy_s - own_s) / max(wall_s, 1e-9)

    def share_of(self, threads: int) -> float:
        """Return the share of the cores for this number of threads that others used: 0 if there were enough cores."""
        wanted = max(1, threads)
        missing = self.cores + wanted - (os.cpu_count() or 1)
        return min(1.0, max(0.0, missing) / wanted)

    @staticmethod
    def _times() -> tuple[float, float, float]:
        machine = psutil.cpu_times()
        busy_s = sum(float(getattr(machine, name, 0.0)) for name in BUSY)
        return time.perf_counter(), busy_s, _own_cpu_s()


def _own_cpu_s() -> float:
    process = psutil.Process()
    own_s = float(sum(process.cpu_times()[:2]))
    with contextlib.suppress(psutil.Error):  # it belongs to another user, or has ended
        parent = process.parent()
        own_s += sum(parent.cpu_times()[:2]) if parent else 0.0
    return own_s
