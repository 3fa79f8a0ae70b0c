"""A child process of slmops: its start, the messages to and from it, and its reliable end.

Both sides write JSON, one object a line. The child's standard input is also its lifeline: it closes when the parent has
ended or no longer needs the child, and the child then ends itself. Output that libraries print in the child goes to its
log; its standard output carries only messages.
"""

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import psutil

from slmops.infra import errors

LOG_TAIL_LINES = 15

# Each of these keeps a library from sending telemetry or from contacting a hub. They override the user's environment in
# the child. Olive and Foundry Local upload usage data even when their own switches are off, but not when they detect a
# CI environment (docs/privacy.md has the measurements).
QUIET_ENVIRONMENT = {
    "CI": "1",
    "DO_NOT_TRACK": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "ORT_TELEMETRY_DISABLED": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
}

# torch's threads otherwise spin while they wait for each other. Beside other busy processes that multiplies the time of
# many small operations: two threads took over 60 s for a calibration of two layers that takes them 7 s if they sleep.
WAITING = {"OMP_WAIT_POLICY": "passive"}

# Foundry Local allocates the cache of a whole context for each answer, 380 MB for SmolLM2-135M, and frees it after it.
# glibc returns it to the system, which gives it back page by page: 0.15 s an answer. Other allocators ignore these.
KEEPING_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**30)}

# With these variables, Python searches other folders for modules before the folder where slmops and its dependencies
# are installed. Without them and without the current directory (-P), no folder of the user can replace a module of a
# child.
SHADOWING = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
PYTHON = (sys.executable, "-P")

Message = dict[str, Any]
Send = Callable[[Message], None]


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child: that of this process, without telemetry and without other module paths."""
    inherited = {name: value for name, value in os.environ.items() if name not in SHADOWING}
    # Processes that a library starts do not inherit -P, but they inherit this variable.
    return {**WAITING, **inherited, **QUIET_ENVIRONMENT, "PYTHONSAFEPATH": "1", **(extra or {})}


def keeping_memory() -> dict[str, str]:
    """Return the variables for a child that answers again and again; those that the user has set stay."""
    return {name: os.environ.get(name, value) for name, value in KEEPING_MEMORY.items()}


class Channel:
    """The parent's side: a module of slmops that runs in a child process, with all its descendants.

    Its output is appended to `log_path` (None: discarded). Without `speaks`, its standard output goes there too.
    `umask` applies to the files that it makes. Raises `OSError` if it cannot be started.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        log_path: Path | None,
        environment: Mapping[str, str],
        work_dir: Path | None = None,
        umask: int = -1,
        speaks: bool = True,
    ) -> None:
        with contextlib.ExitStack() as stack:
            log: int | IO[bytes] = subprocess.DEVNULL
            if log_path:
                log_path.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(log_path.open("ab"))
            self._process = subprocess.Popen(
                [*PYTHON, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if speaks else log,
                stderr=log,
                cwd=work_dir,
                env=dict(environment),
                umask=umask,
                # A Ctrl-C at the terminal is for the parent alone.
                start_new_session=os.name == "posix",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows' own
            )
        self._messages: queue.Queue[Message | None] = queue.Queue()
        if speaks:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        with contextlib.suppress(OSError, ValueError):  # this side closed it
            for line in self._process.stdout:
                self._messages.put(json.loads(line))
        self._messages.put(None)

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def send(self, message: Message) -> None:
        """Send a message; nothing is sent to a process that has ended, which `receive` reports."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """Return the next message, or None once there is no more to come; raises `TimeoutError`."""
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            self._messages.put(None)  # a later call must get the same answer
        return message

    def end(self, grace_s: float, *, ends_by_itself: bool = False) -> int:
        """End the process, or after `grace_s` kill it and all its descendants; returns its exit status.

        The grace period begins when its lifeline closes, unless it `ends_by_itself` now.
        """
        descendants = descendants_of(self.pid)  # they cannot be found any more once it has ended
        if not ends_by_itself:
            self._close(self._process.stdin)
        try:
            _wait(self._process, grace_s)
        except subprocess.TimeoutExpired:
            descendants += descendants_of(self.pid)
        for descendant in descendants:
            with contextlib.suppress(psutil.Error):  # it has ended
                descendant.kill()
        self._process.kill()
        status = self._process.wait()
        self._close(self._process.stdin)
        self._close(self._process.stdout)
        return status

    def _close(self, stream: IO[bytes] | None) -> None:
        if stream:
            with contextlib.suppress(OSError):
                stream.close()


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait for a child's end; raises `subprocess.TimeoutExpired`.

    With a timeout, `Popen.wait` looks after it in steps of up to 50 ms. Linux tells it at once.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # it has ended, or the kernel is older than the call
            ending = os.pidfd_open(process.pid)
            try:
                told = select.poll()
                told.register(ending, select.POLLIN)
                told.poll(1000 * timeout_s)
                timeout_s = 0
            finally:
                os.close(ending)
    process.wait(timeout_s)


def descendants_of(pid: int) -> list[psutil.Process]:
    """Return all descendants of a process; none if it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def end_of_log(log_path: Path) -> str:
    """Return the last lines of a child's log, for the report of a child that ended without a message."""
    tail = "\n".join(log_path.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:])
    return f"The end of its log ({log_path}):\n{tail}"


def error_of(reported: Message) -> errors.SlmopsError:
    """Return the error that a child reported under `error`, as it was raised there."""
    kind: type[errors.SlmopsError] = getattr(errors, reported["kind"], errors.StageFailed)
    return kind(reported["message"], reported["what_to_do"], reported["code"])


# The child's side


def message_of(error: errors.SlmopsError) -> Message:
    """Return the message that reports an error."""
    texts = {"message": error.message, "what_to_do": error.what_to_do, "code": error.code}
    return {"error": {"kind": type(error).__name__, **texts}}


def speak() -> Send:
    """Return a function that sends a message to the parent; all other output from now on goes to the log."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # native libraries print to descriptor 1 as well
    sys.stdout = sys.stderr

    def send(message: Message) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    return send


def listen(on_end: Callable[[], None]) -> Iterator[Message]:
    """Yield the parent's messages without end: when the parent is gone, `on_end` ends this process.

    `on_end` is called in a separate thread, even while this process computes.
    """
    waiting: queue.Queue[Message] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):  # the parent ended in the middle of a line
            for line in sys.stdin.buffer:
                waiting.put(json.loads(line))
        on_end()

    threading.Thread(target=read, daemon=True).start()
    return iter(waiting.get, None)
