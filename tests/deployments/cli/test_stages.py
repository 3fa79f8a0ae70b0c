"""The display of a run's stages: lines with times in a log, a live table on a terminal."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from slmops.deployments.cli import running, stages
from slmops.deployments.cli.deploy import _by_stage
from slmops.deployments.cli.stages import StageDisplay, clock
from slmops.infra.errors import SlmopsError
from slmops.tasks.environment.estimates import estimate_stages
from slmops.tasks.plan import DeployPlan
from tests.support.inspections import inspection


class Time:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def displayed(*, terminal: bool) -> tuple[StageDisplay, io.StringIO]:
    stream = io.StringIO()
    return StageDisplay(Console(file=stream, force_terminal=terminal, width=80, color_system=None)), stream


def test_a_log_has_a_line_with_its_time_for_each_stage_and_a_sign_of_a_long_one(moment: Time) -> None:
    display, log = displayed(terminal=False)
    display("inspect", 0.0, "")
    moment.now += 0.4
    display("inspect", 1.0, "done")
    display("build int8", 0.0, "")
    display("build int8", 0.999, "built before")
    display("build int8", 1.0, "done")
    display("build int4", 0.0, "")
    for second in range(1, 96):
        moment.now += 1
        display("build int4", second / 100, "quantizing")
    display("build int4", 1.0, "failed")
    assert log.getvalue().splitlines() == [
        "inspect: 0.4 s",
        "build int8: 0.0 s, built before",
        "build int4: 60% after 1:00, quantizing",
        "build int4: failed after 1:35",
    ]
    assert display.done == ["inspect", "build int8"]


def test_a_terminal_has_a_table_of_what_is_under_way_with_the_time_that_is_left(moment: Time) -> None:
    display, stream = displayed(terminal=True)
    display("inspect", 0.0, "")
    display("inspect", 1.0, "done")
    display("measure int4", 0.0, "")
    display("evaluate int8", 0.0, "")
    moment.now += 10
    display("measure int4", 0.25, "long\x1b[2J " + "x" * 100)
    display._console.print(display.table())
    shown = stream.getvalue()
    assert "inspect: 0.0 s" in shown
    (row,) = [line for line in shown.splitlines() if line.startswith("measure int4")]
    assert "0:10" in row
    assert "0:30 left" in row
    assert "\\u001b[2J" in row
    assert "1 stage done" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_time_that_is_left_is_that_of_the_present_step(moment: Time) -> None:
    display, stream = displayed(terminal=True)
    display("reference", 0.9, "answers")
    moment.now += 100
    display("reference", 0.1, "distributions")
    moment.now += 10
    display("reference", 0.5, "distributions")
    display._console.print(display.table())
    assert "1:50" in stream.getvalue()
    assert "0:10 left" in stream.getvalue()


def test_the_time_of_the_whole_run_is_the_plan_s_at_the_pace_of_what_has_ended(moment: Time) -> None:
    display, stream = displayed(terminal=True)
    assert display.remaining_s() is None
    display.expect({"calibrate": 10.0, "build int4": 20.0, "measure int4": 30.0, "prove int4": 2.0})
    assert display.remaining_s() == 62
    for stage, seconds in (("inspect", 1), ("calibrate", 20)):
        display(stage, 0.0, "")
        moment.now += seconds
        display(stage, 1.0, "done")
    assert display.remaining_s() == 2 * 52
    display("build int4-rtn", 0.0, "")
    display("build int4-rtn", 1.0, "built before")
    assert display.remaining_s() == 2 * 32
    display("measure int4", 0.0, "")
    moment.now += 25
    assert display.remaining_s() == 2 * 32 - 25
    display._console.print(display.table())
    assert "about 0:39 left in all" in stream.getvalue()
    moment.now += 100  # far beyond its plan
    assert display.remaining_s() == 4


@pytest.mark.parametrize("parameters", [134_515_008, 494_032_768], ids=["side by side", "one after the other"])
def test_soak_and_edge_inputs_of_two_runtimes_take_their_plan_s_time(moment: Time, parameters: int) -> None:
    stages = estimate_stages(inspection(parameters), ["int8"], rows=50)
    plan = DeployPlan(
        name="home",
        parameters=parameters,
        architecture="Qwen2ForCausalLM",
        rows=50,
        stages=tuple(stages),
        time_s=sum(stage.time_s for stage in stages),
        warnings=(),
    )
    display, _ = displayed(terminal=True)
    display.expect(_by_stage(plan))
    assert display.remaining_s() == pytest.approx(plan.time_s)
    exercises = [stage for stage in stages if stage.stage.startswith("exercise")]
    for exercise in exercises:
        runtimes = [runtime for runtime in ("genai", "foundry") if runtime in exercise.stage]
        for runtime in runtimes:
            display(f"exercise int8 in {runtime}", 0.0, "")
        moment.now += exercise.time_s
        for runtime in runtimes:
            display(f"exercise int8 in {runtime}", 1.0, "done")
    assert display.remaining_s() == pytest.approx(plan.time_s - sum(exercise.time_s for exercise in exercises))


def test_long_times_have_hours() -> None:
    assert [clock(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_an_interruption_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str, parameters: object, check: object, display: StageDisplay) -> None:
        for stage in ("start", "inspect", "build int8"):
            display(stage, 0.0, "")
            display(stage, 1.0, "done")
        display("build int4", 0.5, "")
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "_run_in_process", interrupted)
    with pytest.raises(SlmopsError) as caught:
        running.run_flow("deploy", {})
    assert caught.value.message == "Interrupted."
    assert "Done and kept: inspect, build int8." in caught.value.what_to_do
