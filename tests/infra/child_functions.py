"""Children for the supervisor's tests: the faults that a heavy stage can have."""

import ctypes
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.olive.calls import Build
from slmops.infra.process.call import Call, Progress
from slmops.infra.process.endurance import Endure, Messages, endure
from slmops.infra.records import Record


class Doubled(Record):
    value: int
    directory: str
    ci: str


class Double(Call[Doubled]):
    value: int

    def perform(self, progress: Progress) -> Doubled:
        print("a library's chatter")  # must not disturb the message channel
        os.write(1, b"a native library's chatter\n")
        progress(1, 2, "half way")
        return Doubled(value=2 * self.value, directory=str(Path.cwd()), ci=os.environ["CI"])


CALLS: list[int] = []


class Counted(Record):
    pid: int
    calls: int
    directory: str


class CountCalls(Call[Counted]):
    value: int

    def perform(self, progress: Progress) -> Counted:
        CALLS.append(self.value)
        print(f"called with {CALLS[-1]}")
        if CALLS[-1] < 0:
            raise RuntimeError("negative")
        if CALLS[-1] == 0:
            time.sleep(300)
        return Counted(pid=os.getpid(), calls=len(CALLS), directory=str(Path.cwd()))


class Refuse(Call[None]):
    def perform(self, progress: Progress) -> None:
        raise BadInput("The input is odd.", "Make it even.")


class Crash(Call[None]):
    def perform(self, progress: Progress) -> None:
        print("about to fail", file=sys.stderr)
        raise RuntimeError("disk on fire")


class DieWhileItAnswers(Call[None]):
    def perform(self, progress: Progress) -> None:
        pipes = [number for number in range(3, 64) if _is_pipe(number)]
        for number in pipes:  # the message channel among them
            os.write(number, b'{"result": ')
        os.kill(os.getpid(), signal.SIGKILL)


def _is_pipe(number: int) -> bool:
    import fcntl

    try:
        return stat.S_ISFIFO(os.fstat(number).st_mode) and bool(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_WRONLY)
    except OSError:
        return False


class KillItself(Call[None]):
    def perform(self, progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class EndSilently(Call[None]):
    def perform(self, progress: Progress) -> None:
        os._exit(4)


class AnswerOtherwise(Call[int]):
    def perform(self, progress: Progress) -> int:
        return "seven"  # type: ignore[return-value]


class SleepWithAGrandchild(Call[None]):
    def perform(self, progress: Progress) -> None:
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        progress(0, 1, f"{os.getpid()} {grandchild.pid}")
        time.sleep(300)


class UseMemory(Call[int]):
    size_bytes: int

    def perform(self, progress: Progress) -> int:
        block = bytearray(self.size_bytes)
        block[::4096] = b"x" * len(block[::4096])
        time.sleep(0.5)
        return len(block)


class FakeModel:
    """A runtime that answers at once; each character is a token. `fault` says what is wrong with it.

    `leak_bytes` per answer; `ill_after`, `abort_at`, `segfault_at`, `hang_at` a text; `refuse_from`, `abort_from` the
    nth answer; `taken`, the control tokens' ids that it takes from a user; `context_length`.
    """

    def __init__(self, fault: dict[str, Any]) -> None:
        self.context_length: int = fault.get("context_length", 1024)
        self._fault = fault
        self._leaked: list[bytes] = []
        self._answers = 0
        self._ill = False

    def count_prompt_tokens(self, messages: Messages) -> int:
        return sum(len(message["content"]) for message in messages)

    def answer(self, messages: Messages, max_new_tokens: int) -> str:
        self._answers += 1
        self._leaked.append(b"x" * self._fault.get("leak_bytes", 0))
        if self._meets("abort_at", messages) and self._answers >= self._fault.get("abort_from", 0):
            os.abort()
        if self._meets("segfault_at", messages):
            ctypes.string_at(0)
        if self._meets("hang_at", messages):
            native = ctypes.PyDLL("kernel32" if os.name == "nt" else None)  # its calls keep Python's lock
            native.Sleep(300_000) if os.name == "nt" else native.sleep(300)
        self._ill = self._ill or self._meets("ill_after", messages)
        if self._answers >= self._fault.get("refuse_from", math.inf):
            raise RuntimeError("out of order")
        if self.count_prompt_tokens(messages) > self.context_length:
            raise RuntimeError("too long for the context")
        return "ill" if self._ill else "well"

    def takes_for_control_token(self, text: str, token_id: int) -> bool:
        return token_id in self._fault["taken"]

    def _meets(self, trouble: str, messages: Messages) -> bool:
        return trouble in self._fault and any(self._fault[trouble] in message["content"] for message in messages)


class EndureFake(Endure):
    """Run the endurance test on a fake runtime; `fault.json` in the model folder names its fault."""

    def perform(self, progress: Progress) -> None:
        fault = json.loads((self.model_dir / "fault.json").read_text())
        if fault.get("does_not_open"):
            raise StageFailed("The model does not open.", code="model-does-not-open")
        _allocate_and_free(fault.get("freed_bytes", 0))
        endure(FakeModel(fault), self, progress)


def _allocate_and_free(size: int) -> None:
    loaded = bytearray(b"x") * size
    del loaded


class CountedBuild(Call[dict[str, int]]):
    """Build with Olive; answer what it read and wrote by system calls and held in memory at most, in bytes."""

    build: Build
    as_olive_does: bool

    def perform(self, progress: Progress) -> dict[str, int]:
        from slmops.infra.olive import engine

        if self.as_olive_does:
            engine.spare_reads_and_writes = lambda: None
        Path("/proc/self/clear_refs").write_text("5")
        read, written = _bytes_moved()
        self.build.perform(progress)
        read, written = (now - before for now, before in zip(_bytes_moved(), (read, written), strict=True))
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return {"read": read, "written": written, "peak": int(peak.split()[1]) * 1024}


def _bytes_moved() -> tuple[int, int]:
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counted["rchar"]), int(counted["wchar"])
