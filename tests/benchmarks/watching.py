"""Watch resources: the memory of a process, bytes that it reads and writes, and the size of a folder."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_INTERVAL_S = 0.02
TREE_INTERVAL_S = 0.2  # finding descendants reads every process of the machine


@dataclass(frozen=True)
class Watched:
    """The cost of a command: wall time in s, peak resident memory in bytes, and what it printed."""

    seconds: float
    peak_rss_bytes: int
    output: str


def run_watched(
    command: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    descendants: bool = False,
    statuses: Collection[int] = (0,),
) -> Watched:
    """Run a command; its standard error goes to `log`, whose end is in the error if it fails.

    The memory is that of the command's own process or, with `descendants`, the highest sum over all its processes.

    The kernel's own count of a child's peak begins with what the parent had at the fork: a small command would appear
    as large as this process. Its high-water mark of the process's own memory is read instead.
    """
    with log.open("ab") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=cwd, env=environment, text=True)
        peak = _PeakOfTree(process.pid) if descendants else _PeakOf(process.pid)
        peak.start()
        try:
            output, _ = process.communicate()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            seconds = time.perf_counter() - started
            peak.ended.set()
            peak.join()
    if process.returncode not in statuses:
        said = f"{log.read_text('utf-8', 'replace')}\n{output}"  # slmops --json tells errors on standard output
        raise RuntimeError(f"{Path(command[0]).name} ended with status {process.returncode}: {said[-2000:].strip()}")
    return Watched(seconds, peak.rss_bytes, output)


class _PeakOf(threading.Thread):
    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.rss_bytes = 0
        self.ended = threading.Event()
        self._pid = pid

    def run(self) -> None:
        while not self.ended.is_set():
            self.rss_bytes = max(self.rss_bytes, high_water_mark(self._pid))
            self.ended.wait(SAMPLE_INTERVAL_S)


class _PeakOfTree(_PeakOf):
    def run(self) -> None:
        root = psutil.Process(self._pid)
        while not self.ended.wait(TREE_INTERVAL_S):
            with contextlib.suppress(psutil.Error):  # a process that ended meanwhile
                sizes = [process.memory_info().rss for process in (root, *root.children(recursive=True))]
                self.rss_bytes = max(self.rss_bytes, sum(sizes))


def high_water_mark(pid: int) -> int:
    """Return the most resident memory that a process has had, in bytes: on Linux; elsewhere what it has now."""
    status = Path(f"/proc/{pid}/status")
    with contextlib.suppress(OSError):
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


class FolderSize(threading.Thread):
    """The largest sum of file sizes seen under a folder while it is entered, in bytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._folder = folder
        self._ended = threading.Event()

    def __enter__(self) -> "FolderSize":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self._sample()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, folder_bytes(self._folder))


def folder_bytes(folder: Path) -> int:
    """Return the sum of file sizes under a folder; a file of several links counts once, one that vanishes not at all.

    A memory-mapped file counts with the size that it was made with, before anything is in it.
    """
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = (Path(parent) / name).lstat()
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


@dataclass
class Moved:
    """Bytes that a process fetched from the disk and handed to it, as the kernel counts them.

    `read` counts what was not in the page cache, also where a file is mapped into memory. `written` counts pages made
    dirty, also through a mapping, whether or not they have reached the disk. `written_by_calls` counts write calls.
    """

    read: int = 0
    written: int = 0
    written_by_calls: int = 0


@contextmanager
def bytes_moved(pid: int) -> Iterator[Moved]:
    """Count what the process of `pid` moves until the context ends, at which it must still run; Linux only."""
    moved = Moved()
    before = _io_of(pid)
    yield moved
    after = _io_of(pid)
    moved.read = after["read_bytes"] - before["read_bytes"]
    moved.written = after["write_bytes"] - before["write_bytes"]
    moved.written_by_calls = after["wchar"] - before["wchar"]


def _io_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text("ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def forget_cached(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that the next one to read them reads from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
