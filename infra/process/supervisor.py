"""The parent's side: start a child, follow its progress, measure it, and end its whole process tree."""

import contextlib
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from slmops.infra import errors
from slmops.infra.process.abreast import check_not_stopped
from slmops.infra.process.call import Call, ChildResult, OnProgress, R
from slmops.infra.process.channel import Channel, Message, child_environment, end_of_log, error_of

SAMPLE_INTERVAL_S = 0.05
# Finding descendants reads every process of the machine: doing it at each sample would take a tenth of a core.
DESCENDANTS_INTERVAL_S = 0.5
EXIT_GRACE_S = 0.5  # a child that sent its result ends at once by itself


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
    """Perform a call in a new process, or `within` an existing one, and return its answer.

    The child runs in `work_dir`, writes its log to `log_path`, and is killed with all its descendants after
    `deadline_s` or when an exception leaves this function (a cancelled flow run, Ctrl-C). If this process dies, the
    child ends itself.

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
    """A process for several calls, so that their common imports run only once.

    It is started by the first call, and again by the next one after a call that crashed or was stopped; it stays where
    a call raised one of our own errors. Leave it as a context manager.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = environment
        self._channel: Channel | None = None

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
        """Perform a call once, as `run_in_child` does. After a call that `is_last` the process ends.

        The peak memory includes memory that earlier calls left allocated.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        work_dir.mkdir(parents=True, exist_ok=True)
        log_path.touch()
        started = time.monotonic()
        if self._channel and self._channel.status is not None:  # the process was killed since the last call
            self._end()
        target = call.target()
        channel = self._channel = self._channel or Channel(
            "slmops.infra.process.child",
            target,
            log_path=log_path,
            environment=child_environment(self._environment),
            work_dir=work_dir,
        )
        message: Message = {}
        status = 0
        try:
            channel.send(
                {
                    "call": target,
                    "request": call.model_dump(mode="json"),
                    "log_path": str(log_path.absolute()),
                    "work_dir": str(work_dir.absolute()),
                    "is_last": is_last,
                }
            )
            message, peak_rss_bytes = _follow(channel, started + deadline_s, on_progress)
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"{target} was stopped at its deadline of {deadline_s:.0f} s.",
                f"Raise the stage's timeout (slmops config lists them) or see its log: {log_path}",
            ) from None
        finally:
            if is_last or not _is_answer(message):
                status = self._end(ends_by_itself=is_last and bool(message))
        wall_s = time.monotonic() - started
        if "result" in message:
            return ChildResult(call.answer_type().validate_python(message["result"]), wall_s, peak_rss_bytes)
        raise _error_of(target, message, status, log_path)

    def close(self) -> None:
        """End the process and all its descendants."""
        self._end()

    def _end(self, *, ends_by_itself: bool = False) -> int:
        channel, self._channel = self._channel, None
        return channel.end(EXIT_GRACE_S, ends_by_itself=ends_by_itself) if channel else 0


def _follow(channel: Channel, deadline: float, on_progress: OnProgress | None) -> tuple[Message, int]:
    """Return a call's answer (None from a child that ended without one) and the peak memory of its process tree.

    Raises `TimeoutError` at the deadline, which is a time of the monotonic clock, and as `check_not_stopped` does.
    """
    tree = _TreeMemory(channel.pid)
    while True:
        tree.sample()
        check_not_stopped()
        if time.monotonic() > deadline:
            raise TimeoutError
        try:
            message = channel.receive(SAMPLE_INTERVAL_S)
        except TimeoutError:
            continue
        if message is None:
            return {}, tree.peak_rss_bytes
        if "progress" not in message:
            return message, tree.peak_rss_bytes
        if on_progress:
            progress = message["progress"]
            on_progress(progress["done"], progress["total"], progress["what"])


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


def _is_answer(message: Message) -> bool:
    """Whether the child can take another call: it sent a result, or an error that calls raise on purpose."""
    return "result" in message or bool(message.get("error", {}).get("kind"))


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it ended between the listing and the reading
        return 0


def _error_of(target: str, message: Message, status: int, log_path: Path) -> errors.SlmopsError:
    error = message.get("error")
    if error and error["kind"]:
        return error_of(error)
    advice = end_of_log(log_path)
    if error:
        return errors.StageFailed(f"{target} failed: {error['message']}.", advice, code="child-failed")
    if status in (-9, -15, 137):
        return errors.PassingFault(
            f"{target} was killed from outside (status {status}), most often because the machine ran out of memory.",
            advice,
            code="child-killed",
        )
    if status < 0:
        return errors.StageFailed(f"{target} crashed with {signal.Signals(-status).name}.", advice)
    return errors.StageFailed(
        f"{target} ended with status {status} without a result.", advice, code="child-without-result"
    )
