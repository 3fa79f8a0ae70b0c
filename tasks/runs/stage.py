"""`stage` makes a step of a flow a Prefect task; `ends_by_its_errors` ends a flow after bad input or a failed stage.

`final_state` runs such a flow in this process.
"""

import functools
import gc
import logging
import os
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task, flow_engine, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State, TaskRun
from prefect.states import Failed

from slmops.infra.errors import PassingFault, SlmopsError
from slmops.infra.process.garbage import spare_imports
from slmops.tasks.runs.tags import tag_by_parameters

P = ParamSpec("P")
R = TypeVar("R")

REJECTED = 3  # the exit status of a model, or of its promotion, that did not pass
RETRY_DELAYS_S = [5.0, 30.0]

_outcomes: ContextVar[list[object] | None] = ContextVar("_outcomes", default=None)


def may_pass(task: Task[..., object], run: TaskRun, state: State[object]) -> bool:
    """Whether a task run failed because of a fault that may not recur at the next attempt."""
    return isinstance(state.result(raise_on_failure=False), PassingFault)


def stage(
    name: str, *, run_name: str | Callable[..., str] | None = None, tags: Iterable[str] = ()
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a function a task, which is retried only after a passing fault.

    `run_name` is Prefect's template over the parameters, or a function of `parameters`. A stage's own records show what
    was done before, so Prefect keeps no results: its cache would hash every parameter.
    """
    return task(
        name=name,
        task_run_name=run_name,
        tags=tags,
        cache_policy=NO_CACHE,
        retries=len(RETRY_DELAYS_S),
        retry_delay_seconds=RETRY_DELAYS_S,
        retry_condition_fn=may_pass,
    )


def ends_by_its_errors(flow_function: Callable[P, R]) -> Callable[P, R]:
    """Make a flow that raises a `SlmopsError` end in a failed state with that error's sentence as message.

    Prefect logs a traceback for an exception that leaves a flow, which does not help if the input is at fault. The
    state's data is the error, so it is raised for a caller who requests the flow's result. Prefect's engine on a worker
    requests the result too, and would log the error as unexpected. The run is tagged with its model and precisions.
    """

    @functools.wraps(flow_function)
    def ending(*args: P.args, **kwargs: P.kwargs) -> R:
        for logger in ("prefect.flow_runs", "prefect.engine"):
            logging.getLogger(logger).addFilter(_is_unexpected)
        _spare_collections()
        logging.getLogger("prefect.task_runs").addFilter(_is_news)
        tag_by_parameters()
        return _told(functools.partial(flow_function, *args, **kwargs))

    return ending


def _spare_collections() -> None:
    """In a process that Prefect started for this run alone, leave what was imported out of garbage collection."""
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        gc.freeze()
        spare_imports()


def _told(run: Callable[[], R]) -> R:
    """Run a flow's function and tell `final_state` its outcome; a `SlmopsError` becomes a failed state.

    It is not part of the flow's own function, which Prefect pickles with all that it names: no context variable can be.
    """
    outcomes = _outcomes.get()
    own_outcomes = _outcomes.set(None)  # a flow within this one has an outcome of its own
    try:
        result = run()
    except SlmopsError as error:
        name = "Rejected" if error.exit_code == REJECTED else "Failed"
        result = cast(R, Failed(name=name, message=str(error), data=error))
    finally:
        _outcomes.reset(own_outcomes)
    if outcomes is not None:
        outcomes.append(result.data if isinstance(result, State) else result)
    return result


def final_state(flow: Callable[..., object], *args: object, **kwargs: object) -> State[Any]:
    """Run a flow that `ends_by_its_errors` in this process, and return its last state, which has its result or error.

    Where the server's answer to a run's last state is lost, Prefect's client sends that state again, and the server
    answers with the state that it has, without the data. `State.result` would then raise `MissingResult` for a run that
    has completed, and have `FailedRun` in place of the run's own error.
    """
    _wait_for_no_heartbeat()
    outcomes: list[object] = []
    token = _outcomes.set(outcomes)
    try:
        state = cast("State[Any]", flow(*args, **kwargs, return_state=True))
    finally:
        _outcomes.reset(token)
    if state.data is None and outcomes and (state.is_completed() or state.is_failed()):
        state.data = outcomes[-1]
    return state


@functools.cache
def _wait_for_no_heartbeat() -> None:
    """Let runs of this process end without the thread that sends their signs of life, which wakes once a second.

    It sends none after the end. Prefect does not wait for it either at the end of an asynchronous flow.
    """
    if send := getattr(flow_engine, "_send_heartbeats", None):  # not part of Prefect's interface
        flow_engine._send_heartbeats = functools.partial(send, join_on_exit=False)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of a stage says more than that it ended well, which its run's page and graph show."""
    return record.getMessage() != "Finished in state Completed()"


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], SlmopsError))
