"""Works side by side: they run at the same time, and none outlives a failure or an interruption."""

import _thread
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.infra.errors import StageFailed
from slmops.infra.process.abreast import run_abreast
from tests.infra.child_functions import SleepWithAGrandchild
from tests.infra.process.test_process import run, wait_until_gone


def test_works_run_at_the_same_time_and_their_results_are_in_order() -> None:
    met = threading.Barrier(2, timeout=60)  # passed only if both are there
    assert run_abreast([lambda: (met.wait(), "first")[1], lambda: (met.wait(), "second")[1]]) == ["first", "second"]


class Sleeping:
    """A work whose child would sleep for minutes; `has_begun` is set when it does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pids, self.has_begun = folder, list[int](), threading.Event()

    def __call__(self) -> None:
        run(SleepWithAGrandchild(), self.folder, on_progress=self.begin)

    def begin(self, done: float, total: float, what: str) -> None:
        self.pids += map(int, what.split())
        self.has_begun.set()


@pytest.mark.parametrize("first", [True, False])
def test_a_work_that_fails_ends_the_others_and_its_error_is_raised(tmp_path: Path, first: bool) -> None:
    sleeping = Sleeping(tmp_path)

    def fail() -> None:
        assert sleeping.has_begun.wait(60)
        raise StageFailed("The model does not load.")

    with pytest.raises(StageFailed, match="does not load"):
        run_abreast([fail, sleeping] if first else [sleeping, fail])
    assert len(sleeping.pids) == 2
    wait_until_gone(sleeping.pids)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's handler of Ctrl-C, which a process in a shell's background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_ends_all(tmp_path: Path, interruptible: None) -> None:
    sleeping = Sleeping(tmp_path)

    def interrupt() -> None:
        assert sleeping.has_begun.wait(60)
        _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        run_abreast([sleeping, interrupt])
    wait_until_gone(sleeping.pids)
