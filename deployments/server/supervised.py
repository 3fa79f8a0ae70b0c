"""Prefect's own long-running commands as child processes: restarted when they end, stopped with their parent.

Started as `python -m slmops.deployments.server.supervised ARGUMENT...`, it runs Prefect's command line. Standard input
is the lifeline, as in `slmops.infra.process.child`: when it closes, the command is asked to stop, and killed
after a grace period.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from slmops.deployments.server.sqlite_cursors import mend_server_on_sqlite
from slmops.infra.process.channel import Channel, descendants_of, listen
from slmops.infra.process.garbage import spare_imports

LOOK_INTERVAL_S = 0.5
STOP_GRACE_S = 20.0
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0
STEADY_S = 60.0  # a process that ran this long had started correctly

Report = Callable[[str], None]


class Supervised:
    """One Prefect command; `name` is its name in messages, `umask` applies to the files that it makes."""

    def __init__(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str], log_path: Path, umask: int = -1
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._arguments = list(arguments)
        self._environment = dict(environment)
        self._umask = umask
        self._channel: Channel | None = None
        self._delay_s = FIRST_DELAY_S
        self._started_at = 0.0
        self._start_at = 0.0

    def start(self) -> None:
        """Start the command."""
        self._channel = Channel(
            "slmops.deployments.server.supervised",
            *self._arguments,
            log_path=self.log_path,
            work_dir=self.log_path.parent,  # Prefect takes settings from files of its current directory
            environment=self._environment,
            umask=self._umask,
            speaks=False,
        )
        self._started_at = time.monotonic()

    @property
    def is_running(self) -> bool:
        """Whether it runs now."""
        return self._channel is not None and self._channel.status is None

    def look_after(self) -> str | None:
        """Restart it if it ended, after a delay that grows each time. Returns a message, or None."""
        now = time.monotonic()
        if self.is_running:
            if now - self._started_at > STEADY_S:
                self._delay_s = FIRST_DELAY_S
            return None
        if self._channel is not None:
            status, self._channel = self._channel.end(0), None
            return f"{self.name} ended with status {status}; {self._put_off(now)} ({self.log_path})."
        if now >= self._start_at:
            try:
                self.start()
            except OSError as error:  # a full disk or process table may be temporary
                return f"{self.name} could not be started: {error}; {self._put_off(now)}."
        return None

    def _put_off(self, now: float) -> str:
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, LONGEST_DELAY_S)
        self._start_at = now + delay_s
        return f"it starts again in {delay_s:.0f} s"

    def stop(self) -> None:
        """Ask it to stop, and kill it and all its descendants if it does not."""
        if self._channel is not None:
            self._channel.end(STOP_GRACE_S)


class Children:
    """Commands that are started one by one, supervised together, and stopped when this context ends."""

    def __init__(self, stopping: threading.Event, report: Report) -> None:
        self._stopping = stopping
        self._report = report
        self._children: list[Supervised] = []
        self._started = contextlib.ExitStack()

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *error: object) -> None:
        self._started.close()

    @property
    def first(self) -> Supervised | None:
        """The one that was started first."""
        return self._children[0] if self._children else None

    def start(self, child: Supervised) -> None:
        """Start one more."""
        child.start()
        self._children.append(child)
        self._started.callback(child.stop)

    def enter(self, context: contextlib.AbstractContextManager[None]) -> None:
        """Enter a context, which is left before the commands started so far are stopped."""
        self._started.enter_context(context)

    def look_after(self) -> None:
        """Restart commands that end, until this command is stopped."""
        while not self._stopping.wait(LOOK_INTERVAL_S):
            for child in self._children:
                try:
                    message = child.look_after()
                except Exception as error:
                    message = f"{child.name} could not be looked after: {type(error).__name__}: {error}."
                if message:
                    self._report(message)


def _stop_with_the_starter() -> None:
    for run in descendants_of(os.getpid()):  # they end their own children
        with contextlib.suppress(psutil.Error):
            run.send_signal(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT if os.name == "posix" else signal.SIGTERM)
    time.sleep(STOP_GRACE_S / 2)
    for run in descendants_of(os.getpid()):
        with contextlib.suppress(psutil.Error):
            run.kill()
    os._exit(1)


def main() -> None:
    """Run Prefect's command line until standard input closes."""
    spare_imports()
    from prefect.cli import app

    mend_server_on_sqlite()
    listen(_stop_with_the_starter)
    app()


if __name__ == "__main__":
    main()
