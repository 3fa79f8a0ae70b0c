"""Works that wait for child processes, side by side: if one of them fails, the others end at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from threading import Event
from typing import TypeVar

from slmops.infra.errors import StageFailed

R = TypeVar("R")

WAKE_UP_S = 0.2  # Windows interrupts no wait without a limit
_ended: ContextVar[Event | None] = ContextVar("_ended", default=None)


class Stopped(StageFailed):
    """A work was stopped because another one, side by side with it, failed or was interrupted."""

    code = "stopped-with-others"


def check_not_stopped() -> None:
    """Raise `Stopped` if the works among which this one runs are to end."""
    ended = _ended.get()
    if ended and ended.is_set():
        raise Stopped("It was stopped, because a step beside it did not succeed.", "See the other step's error.")


def run_abreast(works: Sequence[Callable[[], R]]) -> list[R]:
    """Do works in threads that have this thread's context, and return their results in order.

    Raises the first error of a work, or what interrupts this thread, after all threads have ended:
    `slmops.infra.process.supervisor` kills the child processes of the others.
    """
    with _stopping() as ended, ThreadPoolExecutor(len(works)) as pool:
        futures: list[Future[R]] = [pool.submit(copy_context().run, work) for work in works]
        try:
            left = {*futures}
            while left and not any(future.done() and future.exception() for future in futures):
                left = wait(left, WAKE_UP_S, FIRST_EXCEPTION).not_done
        finally:
            ended.set()
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [future.result() for future in futures]


@contextmanager
def _stopping() -> Iterator[Event]:
    ended = Event()
    token = _ended.set(ended)
    try:
        yield ended
    finally:
        _ended.reset(token)
