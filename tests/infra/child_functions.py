"""Children for the supervisor's tests: the faults that a heavy stage can have."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from infra.errors import BadInput
from infra.process.child import Progress


def double(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    print("a library's chatter")  # must not disturb the message channel
    os.write(1, b"a native library's chatter\n")
    progress(1, 2, "half way")
    return {"value": 2 * request["value"], "directory": str(Path.cwd()), "ci": os.environ["CI"]}


def refuse(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    raise BadInput("The input is odd.", "Make it even.")


def crash(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    print("about to fail", file=sys.stderr)
    raise RuntimeError("disk on fire")


def kill_itself(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def end_silently(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    os._exit(4)


def sleep_with_a_grandchild(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    progress(0, 1, f"{os.getpid()} {grandchild.pid}")
    time.sleep(300)
    return {}


def use_memory(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    block = bytearray(request["size_bytes"])
    block[::4096] = b"x" * len(block[::4096])
    time.sleep(0.5)
    return {"size_bytes": len(block)}
