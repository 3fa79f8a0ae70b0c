"""Schedules of a model on a real server: set, replaced, checked, removed; none without its parameters."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.deployments.cli import app as cli
from slmops.deployments.server.registration import (
    PREFECT_FILE,
    PULL_STEPS,
    read_deployments,
    register_deployments,
)
from slmops.deployments.server.up_check import check_running
from slmops.deployments.server.work_pool import DEFAULT_POOL, ensure_pool
from tests.support.api_faults import busy, faults_of_the_api, lost
from tests.support.prefect_api import call

RETRAIN = [entry for entry in read_deployments() if entry["name"] in ("retrain", "benchmark")]
NIGHTLY = ("--cron", "0 2 * * *", "--timezone", "Europe/Berlin")


@pytest.fixture
def api(server: str, environment: None, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with the deployments that can have schedules."""
    with temporary_settings({PREFECT_API_URL: server}):
        ensure_pool(DEFAULT_POOL)
        register_deployments(RETRAIN)
        monkeypatch.setenv("PREFECT_API_URL", server)
        yield server


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in the current folder."""
    rows = [{"messages": [{"role": "user", "content": word}], "expected": word} for word in ("on", "off")]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return path


def schedules(api: str, deployment: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = call("GET", f"{api}/deployments/name/{deployment}/{deployment}")["schedules"]
    return [schedule for schedule in found if schedule["active"]]


def test_a_deployment_is_registered_again_only_if_its_form_changed(api: str) -> None:
    assert {found.outcome for found in register_deployments(RETRAIN)} == {"unchanged"}
    address = f"{api}/deployments/{call('GET', f'{api}/deployments/name/benchmark/benchmark')['id']}"
    text = {"type": "string"}
    earlier = {"type": "object", "properties": {"model": text, "reference": text}, "additionalProperties": False}
    call("PATCH", address, {"parameter_openapi_schema": earlier})
    call("PATCH", address, {"parameters": {"reference": "home", "model": "home"}})
    outcomes = {found.name: found.outcome for found in register_deployments(RETRAIN)}
    assert outcomes == {"retrain/retrain": "unchanged", "benchmark/benchmark": "updated"}
    found = call("GET", address)
    assert "reference" in found["parameter_openapi_schema"]["properties"]
    assert found["parameters"] == {"reference": "home"}  # as in the UI; the form has no parameter `model` any more
    call("PATCH", address, {"parameters": {}})


def test_a_schedule_has_its_parameters_and_the_second_one_replaces_the_first(
    api: str, chats: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retrain = ("--dataset", "chats.jsonl", "--base", str(tiny_checkpoint))
    for cron in ("0 1 * * *", "0 2 * * *"):
        timed = ("--cron", cron, "--timezone", "Europe/Berlin")
        assert cli.run(["schedule", "home", *timed, *retrain, "--approval", "--json"]) == 0, capsys.readouterr()
        planned = json.loads(capsys.readouterr().out)
    (nightly,) = schedules(api, "retrain")
    assert nightly["schedule"]["cron"] == "0 2 * * *"
    expected = {"name": "home", "dataset": str(chats), "base": str(tiny_checkpoint), "approval": True}
    assert nightly["parameters"] == expected
    assert planned["next_at"].endswith(("T02:00:00+01:00", "T02:00:00+02:00"))

    assert cli.run(["schedule", "home", "--cron", "0 3 * * 0", "--benchmark"]) == 0
    assert "benchmark of home: 0 3 * * 0 (UTC), next at " in capsys.readouterr().out
    checks = check_running(api, DEFAULT_POOL, RETRAIN).checks
    found = [check.found for check in checks if check.what == "schedule of benchmark/benchmark"]
    assert sum("next run" in text for text in found) == 1

    assert cli.run(["schedule", "home", "--remove"]) == 0
    assert "Removed: retrain, benchmark of home." in capsys.readouterr().out
    assert schedules(api, "retrain") == schedules(api, "benchmark") == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cron", "99 * * * *", "--benchmark"), "'99 * * * *'"),
        (("--cron", "every day", "--benchmark"), "'every day'"),
        (("--cron", "0 2 30 2 *", "--benchmark"), "has no time in the future"),
        (("--cron", "0 2 * * *", "--timezone", "Mars/Base", "--benchmark"), "Mars/Base"),
        (NIGHTLY, "needs --dataset and --base"),
        ((*NIGHTLY, "--dataset", "chats.jsonl"), "needs --base"),
        ((*NIGHTLY, "--dataset", "chats.jsonl", "--base", "./nowhere"), "nowhere"),
        ((), "No cron is given"),
    ],
)
def test_what_would_never_run_is_refused_in_one_sentence(
    api: str, chats: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert cli.run(["schedule", "home", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert schedules(api, "retrain") == schedules(api, "benchmark") == []


def test_a_schedule_that_was_switched_on_without_parameters_is_reported(api: str) -> None:
    deployment = call("GET", f"{api}/deployments/name/retrain/retrain")
    (nightly,) = [schedule for schedule in deployment["schedules"] if schedule["slug"] == "nightly"]
    address = f"{api}/deployments/{deployment['id']}/schedules/{nightly['id']}"
    call("PATCH", address, {"active": True})
    try:
        checked = {check.what: check for check in check_running(api, DEFAULT_POOL, RETRAIN).checks}
        found = checked["schedule of retrain/retrain"]
        assert (found.ok, found.found) == (False, "0 2 * * * (UTC), without dataset, base, name")
    finally:
        call("PATCH", address, {"active": False})


def test_prefects_own_deploy_registers_without_up_and_keeps_changed_schedules(api: str) -> None:
    deployment = call("GET", f"{api}/deployments/name/retrain/retrain")
    (nightly,) = [schedule for schedule in deployment["schedules"] if schedule["slug"] == "nightly"]
    address = f"{api}/deployments/{deployment['id']}/schedules/{nightly['id']}"
    ours = {"dataset": "chats.jsonl", "base": "./my-model", "name": "home"}
    call("PATCH", address, {"schedule": {"cron": "0 5 * * *", "timezone": "Europe/Berlin"}, "parameters": ours})
    try:
        command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--name", "retrain", "--name", "gc"]
        environment = {**os.environ, "PREFECT_API_URL": api}
        subprocess.run(command, cwd=PREFECT_FILE.parent, env=environment, check=True)
        found = call("GET", f"{api}/deployments/name/retrain/retrain")
        (kept,) = [schedule for schedule in found["schedules"] if schedule["slug"] == "nightly"]
        assert (kept["id"], kept["parameters"], kept["schedule"]["cron"]) == (nightly["id"], ours, "0 5 * * *")
        assert (found["pull_steps"], found["work_pool_name"]) == (PULL_STEPS, DEFAULT_POOL)
        assert "keep" in call("GET", f"{api}/deployments/name/gc/gc")["parameter_openapi_schema"]["properties"]
    finally:
        rule = {"cron": "0 2 * * *", "timezone": "UTC"}
        call("PATCH", address, {"schedule": rule, "parameters": {}, "active": False})
        register_deployments(RETRAIN)


def test_without_a_server_nothing_is_scheduled(
    environment: None, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["schedule", "home", "--cron", "0 2 * * *", "--benchmark"]) == 2
    assert "No Prefect server is set" in capsys.readouterr().err


def test_an_api_that_stays_locked_is_said_in_one_sentence(api: str, capsys: pytest.CaptureFixture[str]) -> None:
    with faults_of_the_api(busy("GET", "/deployments/", times=99)):
        assert cli.run(["schedule", "home", "--remove"]) == 1
    assert "Prefect's API stopped to answer: it answers with status 503." in capsys.readouterr().err


def test_a_schedule_whose_change_the_server_does_not_confirm_is_set(
    api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weekly = ("schedule", "home", "--cron", "0 3 * * 0", "--benchmark")
    assert cli.run(weekly) == 0
    with faults_of_the_api(lost("DELETE", "/schedules/"), lost("POST", "/schedules$")):
        assert cli.run(weekly) == 0, capsys.readouterr().err
    assert len(schedules(api, "benchmark")) == 1
    assert cli.run(["schedule", "home", "--remove"]) == 0
