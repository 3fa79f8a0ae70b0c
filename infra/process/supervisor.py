"""The parent's side: start a child, follow its progress, measure it, and end its whole process tree."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from slmops.infra import errors
from slmops.infra.process.call import Call, ChildResult, OnProgress, R

SAMPLE_INTERVAL_S = 0.05
# Finding descendants looks at every process of the machine: at each sample it would take a tenth of a core.
DESCENDANTS_INTERVAL_S = 0.5
LOG_TAIL_LINES = 15
EXIT_GRACE_S = 0.5  # a child that sent its result ends at once by itself

# Each of these keeps a library from calling home or from looking for a hub. They are set in the child,
# over whatever the user's environment says. Olive and Foundry Local upload usage data even when their
# own switches are off, but neither does when it finds itself in CI (docs/privacy.md has the measurements).
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

# With these Python looks for modules elsewhere before it looks where slmops and its dependencies are installed. Without
# them, and without the current directory (-P), no folder of the user's stands in for a module of a child.
SHADOWING = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
PYTHON = (sys.executable, "-P")


def run_in_child(
    call: Call[R],
    *,
    deadline_s: float,
    log_path: Path,
    work_dir: Path,
    on_progress: OnProgress | None = None,
    environment: Mapping[str, str] | None = None,
    within: "ChildProcess | None" = None,
) -> ChildResult[R]:
    """Perform a call in a process of its own, or `within` one that there is, and return its answer.

    The child runs in `work_dir`, writes its log to `log_path`, and is killed with all its descendants when `deadline_s`
    is over or when this is left by any exception (a cancelled flow run, Ctrl-C). If this process dies, the child ends
    itself.

    Raises `DeadlineExceeded`; the child's own `SlmopsError`; `PassingFault` when it was killed from
    outside; `StageFailed` with the end of the log for anything else.
    """
    with contextlib.nullcontext(within) if within else ChildProcess(environment) as child:
        return child.run(
            call,
            deadline_s=deadline_s,
            log_path=log_path,
            work_dir=work_dir,
            on_progress=on_progress,
            is_last=within is None,
        )


class ChildProcess:
    """A process for several calls, which wait for the imports that they share only once.

    It is started by the first call, and by the next one after a call that failed. Leave it as a context manager.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def __enter__(self) -> "ChildProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(
        self,
        call: Call[R],
        *,
        deadline_s: float,
        log_path: Path,
        work_dir: Path,
        on_progress: OnProgress | None = None,
        is_last: bool = False,
    ) -> ChildResult[R]:
        """Perform a call once, as `run_in_child` does; `is_last` lets the process end with it.

        The peak of the memory counts what earlier calls left.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        work_dir.mkdir(parents=True, exist_ok=True)
        log_path.touch()
        started = time.monotonic()
        if self._process and self._process.poll() is not None:  # it was killed since the last call
            self._end()
        target = call.target()
        process = self._process or self._start(target, log_path, work_dir)
        line = {
            "call": target,
            "request": call.model_dump(mode="json"),
            "log_path": str(log_path.absolute()),
            "work_dir": str(work_dir.absolute()),
            "is_last": is_last,
        }
        message: dict[str, Any] = {}
        try:
            assert process.stdin
            with contextlib.suppress(BrokenPipeError):  # a child that died at once is reported by its exit status
                process.stdin.write(json.dumps(line).encode() + b"\n")
                process.stdin.flush()
            message, peak_rss_bytes = _follow(process, self._messages, started + deadline_s, on_progress)
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"{target} was stopped at its deadline of {deadline_s:.0f} s.",
                f"Raise the stage's timeout (slmops config lists them) or see its log: {log_path}",
            ) from None
        finally:
            if is_last or "result" not in message:
                self._end()
        wall_s = time.monotonic() - started
        if "result" in message:
            return ChildResult(call.answer_type().validate_python(message["result"]), wall_s, peak_rss_bytes)
        raise _error_of(target, message, process.returncode, log_path)

    def close(self) -> None:
        """End the process, which waits for a call, with all its descendants."""
        if self._process and self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            _end_tree(process)

    def _start(self, target: str, log_path: Path, work_dir: Path) -> "subprocess.Popen[bytes]":
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [*PYTHON, "-m", "slmops.infra.process.child", target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=work_dir,
                env=child_environment(self._environment),
                start_new_session=os.name == "posix",
            )
        self._process = process
        self._messages = queue.Queue()
        threading.Thread(target=_read_messages, args=(process.stdout, self._messages), daemon=True).start()
        return process


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child: this process's own, quiet, without what could stand in for its modules."""
    inherited = {name: value for name, value in os.environ.items() if name not in SHADOWING}
    # -P is not handed on to what a library starts in its turn; this is.
    return {**inherited, **QUIET_ENVIRONMENT, "PYTHONSAFEPATH": "1", **(extra or {})}


def _follow(
    process: subprocess.Popen[bytes],
    messages: "queue.Queue[dict[str, Any] | None]",
    deadline: float,
    on_progress: OnProgress | None,
) -> tuple[dict[str, Any], int]:
    tree = _TreeMemory(process.pid)
    while True:
        tree.sample()
        if time.monotonic() > deadline:
            raise TimeoutError
        try:
            message = messages.get(timeout=SAMPLE_INTERVAL_S)
        except queue.Empty:
            continue
        if message is None:
            return {}, tree.peak_rss_bytes
        if "progress" not in message:
            return message, tree.peak_rss_bytes
        if on_progress:
            progress = message["progress"]
            on_progress(progress["done"], progress["total"], progress["what"])


def _read_messages(stream: Any, messages: "queue.Queue[dict[str, Any] | None]") -> None:
    with contextlib.suppress(ValueError):  # a line that the child's end has cut short
        for line in stream:
            messages.put(json.loads(line))
    messages.put(None)


class _TreeMemory:
    """The highest sum of resident memory seen over a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self.peak_rss_bytes = 0
        self._root = psutil.Process(pid)
        self._descendants: list[psutil.Process] = []
        self._look_again_at = time.monotonic()

    def sample(self) -> None:
        if time.monotonic() >= self._look_again_at:
            with contextlib.suppress(psutil.Error):
                self._descendants = self._root.children(recursive=True)
            self._look_again_at = time.monotonic() + DESCENDANTS_INTERVAL_S
        processes = [self._root, *self._descendants]
        self.peak_rss_bytes = max(self.peak_rss_bytes, sum(_rss_bytes(process) for process in processes))


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it ended between the listing and the reading
        return 0


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    descendants: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        descendants = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_GRACE_S)
    for descendant in descendants:
        with contextlib.suppress(psutil.Error):
            descendant.kill()
    if process.poll() is None:
        process.kill()
    for stream in (process.stdin, process.stdout):
        if stream:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()


def _error_of(target: str, message: dict[str, Any], returncode: int, log_path: Path) -> errors.SlmopsError:
    error = message.get("error")
    if error and error["kind"]:
        kind: type[errors.SlmopsError] = getattr(errors, error["kind"], errors.StageFailed)
        return kind(error["message"], error["what_to_do"], error["code"])
    tail = "\n".join(log_path.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:])
    advice = f"The end of its log ({log_path}):\n{tail}"
    if error:
        return errors.StageFailed(f"{target} failed: {error['message']}.", advice)
    if returncode in (-9, -15, 137):
        return errors.PassingFault(
            f"{target} was killed from outside (status {returncode}), "
            "most often because the machine ran out of memory.",
            advice,
        )
    if returncode < 0:
        return errors.StageFailed(f"{target} crashed with {signal.Signals(-returncode).name}.", advice)
    return errors.StageFailed(f"{target} ended with status {returncode} without a result.", advice)
