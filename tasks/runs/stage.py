"""Which failures a task tries again: only those whose reason may be gone."""

from typing import Any

from prefect import Task
from prefect.client.schemas import State, TaskRun

from slmops.infra.errors import PassingFault

RETRIES = 2
RETRY_DELAYS_S = [5.0, 30.0]


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a task run failed by a fault that may be gone at the next attempt."""
    return isinstance(state.result(raise_on_failure=False), PassingFault)


PASSING_FAULTS: dict[str, Any] = {
    "retries": RETRIES,
    "retry_delay_seconds": RETRY_DELAYS_S,
    "retry_condition_fn": may_pass,
}
