"""Promotions that wait for a person: paused on a real Prefect server, answered over its API, or at the terminal."""

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas import State
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.deployments.cli import app as cli
from slmops.deployments.cli.approving import ask_here
from slmops.flows import promote as promote_flow
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.tasks.exams.estimates import Estimate
from slmops.tasks.foundry import registration
from slmops.tasks.runs import pause
from slmops.tasks.runs.stage import final_state
from slmops.tasks.training.comparison import Challenge, RetrainReport, with_approval
from slmops.tasks.versions import change
from slmops.tasks.versions.approval import Approval, answered_by
from slmops.tasks.workshop import Workshop, working_in
from tests.flows.test_promotion import Foundry, last_artifact, passed
from tests.support.api_faults import busy, faults_of_the_api, lost
from tests.support.errors import coded
from tests.support.paused_runs import paused
from tests.support.prefect_api import call, query


@pytest.fixture
def registry(settings: Settings, tmp_path: Path) -> ModelRegistry:
    """home@1, the champion, and home@2, whose proof the run need not repeat."""
    registry = open_registry(settings)
    for number in (1, 2):
        passed(registry, tmp_path, number)
    registry.set_alias("home", CHAMPION, 1, "the first")
    return registry


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, server: str) -> Iterator[None]:
    monkeypatch.setattr(pause, "POLL_S", 0.1)
    planned = change.plan_promotion
    monkeypatch.setattr(change, "plan_promotion", lambda *asked: replace(planned(*asked), is_proven=True))
    monkeypatch.setattr(registration, "ask_foundry", Foundry().ask)
    with temporary_settings({PREFECT_API_URL: server}):
        yield


def promoting() -> State[Any]:
    return final_state(promote_flow.promote, "home@2", "better", approval=True)


def test_the_run_waits_with_the_figures_until_a_person_approves(server: str, registry: ModelRegistry) -> None:
    with paused(promoting, server) as run:
        keys = call("GET", f"{server}/flow_runs/{run.id}")["state"]["state_details"]["run_input_keyset"]
        shown = call("GET", f"{server}/flow_runs/{run.id}/input/{keys['description']}")
        run.answer(decision="promote", by="Ada", note="knows the garage")
        state = run.result()
    assert "Promote home@2 in place of home@1?" in shown
    assert state.is_completed(), state.message
    assert registry.alias("home", CHAMPION) == 2
    (newest, _) = registry.champion_history("home")
    assert newest.reason == "better; approved by Ada: knows the garage"
    assert {"champion", "model:home", "slmops"} <= {*call("GET", f"{server}/flow_runs/{run.id}")["tags"]}


def test_a_declined_one_leaves_the_champion_and_says_who_declined(server: str, registry: ModelRegistry) -> None:
    with paused(promoting, server) as run:
        run.answer(decision="keep the champion", by="Ada")
        state = run.result()
    assert (state.is_failed(), state.name) == (True, "Rejected")
    assert registry.alias("home", CHAMPION) == 1
    assert "home@2 was not promoted: declined by Ada. home@1 stays the champion." in last_artifact()


def test_no_approval_is_lost_with_an_answer_of_the_server(server: str, registry: ModelRegistry) -> None:
    faults = (
        *(lost("POST", path, times=2) for path in ("/set_state$", "/input$", "/flow_runs/filter$")),
        *(fault("POST", "/resume$") for fault in (busy, lost)),
    )
    with faults_of_the_api(*faults), paused(promoting, server) as run:
        run.answer(decision="promote")
        state = run.result()
    assert state.is_completed(), state.message
    assert registry.alias("home", CHAMPION) == 2


def test_a_run_waits_on_while_the_server_does_not_answer(server: str, registry: ModelRegistry) -> None:
    with paused(promoting, server) as run:
        with faults_of_the_api(outage := busy("GET", f"/flow_runs/{run.id}$", times=13)):  # the client tries six times
            while len(outage.hits) < 13:
                assert not run.outcome.done(), run.result()
                time.sleep(0.05)
        run.answer(decision="promote")
        assert run.result().is_completed()
    assert registry.alias("home", CHAMPION) == 2


def test_a_run_that_a_failed_test_leaves_waiting_is_ended(server: str, registry: ModelRegistry) -> None:
    with pytest.raises(ZeroDivisionError), paused(promoting, server) as run:
        raise ZeroDivisionError
    assert run.outcome.done()
    assert registry.alias("home", CHAMPION) == 1


def test_nobody_answers_in_time(
    server: str, registry: ModelRegistry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLMOPS_TIMEOUT__APPROVAL_S", "1")
    state = promoting()
    assert (state.is_failed(), state.name) == (True, "Rejected")
    error = state.result(raise_on_failure=False)
    assert coded("not-approved", "nobody approved it within")(error)
    assert error.exit_code == 3
    assert registry.alias("home", CHAMPION) == 1
    assert "nobody approved it within" in last_artifact()
    (run,) = query(server, "flow_runs", sort="START_TIME_DESC", limit=1)
    assert run["state"]["name"] == "Rejected"


def test_a_version_that_is_the_champion_asks_nobody(registry: ModelRegistry) -> None:
    registry.set_alias("home", CHAMPION, 2, "promoted meanwhile")
    assert promoting().is_completed()


@pytest.mark.parametrize(
    ("said", "status", "sentence"),
    [
        (Approval(given=True, by="Ada"), "promoted", "It was approved by Ada."),
        (Approval(note="too slow"), "kept", "It was declined: too slow. home@1 stays the champion."),
        (Approval(answered=False), "unapproved", "But nobody approved it within 24 h. home@1 stays the champion."),
    ],
)
def test_a_retrain_asks_about_a_better_candidate_only(
    settings: Settings, registry: ModelRegistry, said: Approval, status: str, sentence: str
) -> None:
    challenge = Challenge(
        champion="home@1",
        challenger="home@2",
        rows=9,
        champion_score=Estimate(value=0.5, low=0.5, high=0.5),
        challenger_score=Estimate(value=0.9, low=0.9, high=0.9),
        gain=Estimate(value=0.4, low=0.4, high=0.4),
    )
    better = RetrainReport(name="home", status="promoted", summary="home@2 is better.", version=2, challenge=challenge)
    asked: list[str] = []

    def person(question: str) -> Approval:
        asked.append(question)
        return said

    with working_in(Workshop(settings, registry)), answered_by(person):
        report = with_approval(better)
        kept = better.model_copy(update={"status": "kept"})
        assert with_approval(kept) == kept
    assert (report.status, report.summary) == (status, f"home@2 is better. {sentence}")
    assert report.approval == said
    (question,) = asked
    assert "home@2 is better." in question


@pytest.mark.parametrize(("typed", "given"), [("y\n", True), ("\n", False), ("n\n", False)])
def test_at_a_terminal_only_a_yes_promotes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, given: bool
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert ask_here("home@2 or home@1?").given == given
    captured = capsys.readouterr()
    assert "home@2 or home@1?" in captured.err
    assert captured.out == ""  # --json has it for its document


def test_a_command_without_terminal_and_server_is_refused(
    environment: None, home: Path, registry: ModelRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["promote", "home@2", "--approval"]) == 2
    assert "Nobody can approve" in capsys.readouterr().err
    assert registry.alias("home", CHAMPION) == 1
