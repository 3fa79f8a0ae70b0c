"""Work in a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from threading import Thread
from typing import TypeVar

R = TypeVar("R")


def in_thread(work: Callable[[], R]) -> "Future[R]":
    """Begin work in this test's context, such as Prefect's settings; a wait for its outcome needs a limit.

    Unlike a pool's, its thread is a daemon: if it never ends, the other tests and the end of their process do not wait.
    """
    outcome = Future[R]()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=copy_context().run, args=(run,), daemon=True).start()
    return outcome
