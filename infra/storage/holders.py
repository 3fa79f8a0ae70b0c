"""Names of processes that hold something in a store, and whether such a process has ended."""

import hashlib
import os
import socket
import uuid
from functools import cache

import psutil

# Start times of processes are exact to about a second, because they are computed from the machine's boot time.
START_TOLERANCE_S = 2


def this_process() -> str:
    """Return a name for this process, of hex digits and tildes: `MACHINE~PID~START`."""
    return _process(os.getpid())


def has_ended(holder: str) -> bool:
    """Whether a process named by `this_process` has certainly ended: it ran on this machine and no longer exists."""
    machine, _, process = holder.partition("~")
    pid, _, started = process.partition("~")
    if machine != _machine() or not pid.isdecimal() or not started.isdecimal():
        return False
    try:
        found = psutil.Process(int(pid))
        ended = found.status() == psutil.STATUS_ZOMBIE
        return ended or abs(found.create_time() - int(started)) > START_TOLERANCE_S
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


@cache  # temporary files are named by it; a forked process has another number
def _process(pid: int) -> str:
    return f"{_machine()}~{pid}~{int(psutil.Process(pid).create_time())}"


@cache
def _machine() -> str:
    # Many people may share a store. The hash identifies a machine without revealing its name.
    facts = f"{socket.gethostname()} {uuid.getnode():x}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
