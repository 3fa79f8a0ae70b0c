"""A run of this process that waits for a person, and its answer over the API of a Prefect server."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar
from uuid import uuid4

from prefect import tags

from tests.support.prefect_api import call, query
from tests.support.threads import in_thread

R = TypeVar("R")
DEADLINE_S = 240.0
POLL_S = 0.05


@dataclass(frozen=True)
class PausedRun(Generic[R]):
    """A paused run: its id, and what its flow will return."""

    api: str
    id: str
    outcome: Future[R]

    def answer(self, **given: str) -> None:
        """Answer as the UI does. A run that has only just paused may not have its form yet, and refuses."""
        deadline = time.monotonic() + DEADLINE_S
        while call("POST", f"{self.api}/flow_runs/{self.id}/resume", {"run_input": given})["status"] == "REJECT":
            assert time.monotonic() < deadline
            time.sleep(POLL_S)

    def result(self) -> R:
        """Wait for the flow's end, and return what it returned."""
        return self.outcome.result(DEADLINE_S)


@contextmanager
def paused(run: Callable[[], R], api: str) -> Iterator[PausedRun[R]]:
    """Call a flow in a thread of its own, and provide its run when it waits; at the end the run is over."""
    mark = f"paused-{uuid4().hex}"
    with tags(mark):
        outcome = in_thread(run)
    try:
        yield PausedRun(api, _id_of_paused(api, mark, outcome), outcome)
    finally:
        for left in [] if outcome.done() else query(api, "flow_runs", flow_runs={"tags": {"all_": [mark]}}):
            with suppress(AssertionError):
                PausedRun(api, left["id"], outcome).answer()
            outcome.exception(DEADLINE_S)


def _id_of_paused(api: str, mark: str, outcome: Future[R]) -> str:
    wanted = {"tags": {"all_": [mark]}, "state": {"type": {"any_": ["PAUSED"]}}}
    deadline = time.monotonic() + DEADLINE_S
    while not (found := query(api, "flow_runs", flow_runs=wanted)):
        assert not outcome.done(), outcome.result()
        assert time.monotonic() < deadline
        time.sleep(POLL_S)
    return str(found[0]["id"])
