"""Names of processes that hold something in a store, and whether such a process has ended.

A process is told by what no clock moves: on Linux by the id of the machine's boot and the clock ticks from the boot to
the start of the process, elsewhere by the time of its start, which the operating system records once.
"""

import hashlib
import os
import socket
import stat
import sys
import time
import uuid
from datetime import timedelta
from functools import cache
from pathlib import Path

WINDOWS = os.name == "nt"
REPLACE_TRIES, REPLACE_PAUSE_S = 40, 0.05


def this_process() -> str:
    """Return a name for this process, of hex digits and tildes: `MACHINE~PID~START`."""
    return _process(os.getpid())


def name_prefix() -> str:
    """Return the beginning of this process's temporary names, which shows other processes whether it has ended."""
    return f"{this_process()}-"


def temporary_name(ending: str = "") -> str:
    """Return a new hidden name for a temporary file or folder of this process, beside what it becomes."""
    return f".{name_prefix()}{uuid.uuid4().hex}{ending}"


def move_to(source: Path, target: Path) -> None:
    """Move a file to `target` in one step, in place of what is there; or a folder, to a new place. Raises `OSError`.

    Windows refuses this while another process has `target`, or a file of the folder, open. Such readers, among them
    virus scanners, end in a moment: it is tried for 2 s.
    """
    for _ in range(REPLACE_TRIES if WINDOWS else 0):
        try:
            source.replace(target)
        except PermissionError:
            time.sleep(REPLACE_PAUSE_S)
        else:
            return
    source.replace(target)


def protect_from_writing(file: Path) -> None:
    """Make a file read-only, because a hard link to it may lie in a model folder.

    Not on Windows, where none of the names of a read-only file can be removed or replaced.
    """
    if not WINDOWS:
        file.chmod(stat.S_IREAD | stat.S_IRGRP | stat.S_IROTH)


def holder_of(name: str) -> str:
    """Return the process whose `name_prefix` a temporary name, or a key's last part, begins with."""
    return name.rpartition("/")[2].lstrip(".").partition("-")[0]


def has_ended(holder: str) -> bool:
    """Whether a process named by `this_process` has certainly ended: it ran on this machine and no longer exists."""
    return _runs(holder) is False


def is_lost(holder: str, age: timedelta, term: timedelta) -> bool:
    """Whether nobody needs to wait for a process: it has ended, or it gave no sign for longer than `term`.

    A process that runs on this machine is never lost: a clock that was set, by years on a machine without a battery,
    ages what it holds.
    """
    runs = _runs(holder)
    return runs is False or (runs is None and age > term)


def _runs(holder: str) -> bool | None:
    """Whether a process of this machine runs; None for another machine's, and for what cannot be known."""
    machine, _, process = holder.partition("~")
    pid, _, started = process.partition("~")
    if machine != _machine() or not pid.isdecimal() or not started:
        return None
    import psutil  # here, because every command names temporary files, and few look for those of others

    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE and _start(int(pid)) == started
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False
    except (psutil.Error, OSError):
        return None


@cache  # temporary files are named by it; a forked process has another number
def _process(pid: int) -> str:
    return f"{_machine()}~{pid}~{_start(pid)}"


def _start(pid: int) -> str:
    """Return what is different for each process that ever had this number on this machine."""
    if sys.platform == "linux":
        fields = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return f"{_boot()}{int(fields[19]):x}"  # field 22 of proc_pid_stat(5): the start in ticks since the boot
    import psutil

    return f"{int(psutil.Process(pid).create_time() * 1000):x}"


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").replace("-", "").strip()[:16]


@cache
def _machine() -> str:
    # Many people may share a store. The hash identifies a machine without revealing its name.
    facts = f"{socket.gethostname()} {uuid.getnode():x}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
