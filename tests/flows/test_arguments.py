"""What Prefect looks for in the arguments of stages."""

import pytest
from prefect import flow, task_engine
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.tasks.build.calibration import Calibration, as_one
from slmops.tasks.runs.stage import stage

TOKENS = 5000


@stage("calibrate")
def calibrate() -> tuple[Calibration, str]:
    made = Calibration(rows=(tuple(range(TOKENS)),), answers=1)
    return made, str(TaskRunContext.get().task_run.id)


@stage("build")
def build(calibration: Calibration | None) -> tuple[int, list[str]]:
    inputs = TaskRunContext.get().task_run.task_inputs["calibration"]
    return len(calibration.rows[0]) if calibration else 0, [str(found.id) for found in inputs]


@flow(name="calibrated")
def calibrated() -> tuple[str, tuple[int, list[str]], tuple[int, list[str]]]:
    made, made_by = calibrate()
    return made_by, build(as_one(made)), build(as_one(None))


def test_prefect_visits_no_token_of_a_calibration_and_knows_still_which_run_made_it(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited = []
    resolve = task_engine.resolve_to_final_result

    def counted(expression: object, context: dict[str, object]) -> object:
        visited.append(expression)
        return resolve(expression, context)

    monkeypatch.setattr(task_engine, "resolve_to_final_result", counted)
    with temporary_settings({PREFECT_API_URL: server}):
        made_by, with_texts, without = calibrated()
    assert with_texts == (TOKENS, [made_by])
    assert without == (0, [])
    assert 0 < len(visited) < 10
