"""Progress of stages: reported to listeners in this process, and to Prefect as an artifact."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext

from slmops.infra.process.call import OnProgress
from slmops.tasks.runs.artifacts import shown_in_prefect

ARTIFACT_INTERVAL_S = 2.0
BEFORE_THE_END = 0.999  # the share of a stage whose last step is done

StageListener = Callable[[str, float, str], None]
_listeners: list[StageListener] = []


@contextmanager
def listening(listener: StageListener) -> Iterator[None]:
    """Call `listener(stage, share from 0 to 1, current activity)` at every step of every stage.

    The share is 1 only when the stage ends; the activity is `done` or `failed` then.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def stage_progress(stage: str) -> Iterator[OnProgress]:
    """Yield the callback that a stage reports its steps to.

    The artifact is made after two seconds of a stage, and updated at most every two seconds.
    """
    artifact: UUID | None = None
    posted_at = time.monotonic()
    doing = ""

    def report(done: float, total: float, what: str) -> None:
        nonlocal artifact, posted_at, doing
        share = min(max(done / total, 0.0), 1.0) if total else 0.0
        for listener in _listeners:
            listener(stage, min(share, BEFORE_THE_END), what)
        step = what.partition(":")[0]  # the next column is its progress
        if step != doing and TaskRunContext.get():
            get_run_logger().info("%s: %s", stage, what)
            doing = step
        if time.monotonic() - posted_at >= ARTIFACT_INTERVAL_S and TaskRunContext.get():
            with shown_in_prefect("The progress"):
                artifact = _post(artifact, stage, share)
            posted_at = time.monotonic()

    for listener in _listeners:
        listener(stage, 0.0, "")
    try:
        yield report
    except Exception:
        for listener in _listeners:
            listener(stage, 1.0, "failed")
        raise
    for listener in _listeners:
        listener(stage, 1.0, "done")
    if artifact:
        with shown_in_prefect("The progress"):
            _post(artifact, stage, 1.0)


def _post(artifact: UUID | None, stage: str, share: float) -> UUID:
    percent = round(100 * share, 1)
    if artifact is None:
        created = create_progress_artifact(progress=percent, description=stage)
        assert isinstance(created, UUID)
        return created
    update_progress_artifact(artifact, progress=percent, description=stage)
    return artifact
