"""With a running Prefect server: a deploy's records in its API, and cancellation over the API."""

import json
import logging
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from slmops.tasks.runs import progress
from slmops.tasks.runs.artifacts import EMPTY_CELL
from tests.e2e.conftest import ROOT, Slmops
from tests.e2e.test_deploy import INT4, children_of
from tests.support.prefect_api import call, query, wait_for_lineage

pytestmark = pytest.mark.slow


def test_the_server_has_the_run_its_tasks_and_the_report(
    slmops: Slmops, tiny: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "ARTIFACT_INTERVAL_S", 0.0)  # no stage of a tiny model surely takes two seconds
    report = slmops.json("deploy", tiny, "--name", "served", *INT4)
    (run,) = query(server, "flow_runs", flow_runs={"name": {"any_": ["deploy-served"]}})
    assert run["state"]["name"] == "Completed"
    assert run["parameters"]["name"] == "served"
    tasks = query(server, "task_runs", task_runs={"flow_run_id": {"any_": [run["id"]]}})
    names = {task["name"] for task in tasks}
    assert {"check-environment", "prepare-served", "build-int4", "store-served", "reference", "measure-int4"} <= names
    assert {"evaluate-int4", "judge-int4", "register-int4", "prove-int4", "register-champion"} <= names
    artifacts = {
        artifact["key"]: artifact
        for artifact in query(server, "artifacts", artifacts={"flow_run_id": {"any_": [run["id"]]}})
        if artifact["key"]
    }
    assert f"# served@{report['version']}: registered" in artifacts["slmops-served"]["data"]
    assert "served-int4-generic-cpu:1" in artifacts["slmops-served-variants"]["data"]
    link = f"[The report of served@1](../artifact/{artifacts['slmops-served']['id']})"
    assert link in artifacts["slmops-served-version"]["data"]
    assert json.loads(artifacts["slmops-served-document"]["data"]) == report
    (model,) = [row for row in json.loads(artifacts["slmops-models"]["data"]) if row["model"] == "served"]
    assert (model["champion"], model["candidate"], model["precision"]) == ("served@1", EMPTY_CELL, "int4")
    told = slmops.json("status")
    assert [(model["name"], model["champion"], model["precision"]) for model in told["models"]] == [
        ("served", 1, "int4")
    ]
    assert "served-int4-generic-cpu:1" in told["registered"]
    assert told["prefect"]["api_url"] == server
    (listed,) = [found for found in slmops.json("runs", "--limit", "200")["runs"] if found["model"] == "served"]
    assert (listed["id"], listed["flow"], listed["state"]) == (run["id"], "deploy", "Completed")
    assert listed["address"] == f"{server.removesuffix('/api')}/runs/flow-run/{run['id']}"
    assert listed["took_s"] > 0
    wait_for_events(server, "served", {"slmops.champion.promoted", "slmops.version.registered"})
    stored = slmops.home / "store" / "models" / "served"
    source = json.loads((stored / "1" / "manifest.json").read_text("utf-8"))["source"]
    version, champion = (stored / "1").as_uri(), (stored / "aliases" / "champion").as_uri()
    wait_for_lineage(server, {version: [f"checkpoint://sha256/{source['digest']}"], champion: [version]})
    of_the_run = {"type": {"any_": ["progress"]}, "flow_run_id": {"any_": [run["id"]]}}
    posted = query(server, "artifacts", artifacts=of_the_run)
    assert {"build int4", "evaluate int4"} <= {
        artifact["description"] for artifact in posted if artifact["data"] == 100
    }
    assert not (slmops.home / "prefect" / "prefect.db").exists()
    logs = query(server, "logs", logs={"flow_run_id": {"any_": [run["id"]]}})
    assert any("evaluate int4" in log["message"] for log in logs)
    assert any(re.match(r"int4 passed the gate: \d+ checks\.", log["message"]) for log in logs)
    assert [log["message"] for log in logs if log["level"] >= logging.WARNING] == []
    assert [log["message"] for log in logs if log["message"].startswith("Finished in state")] == [
        "Finished in state Completed('served@1 int4 registered.')"
    ]


def wait_for_events(server: str, name: str, expected: set[str], since: datetime | None = None) -> None:
    """Wait until the server has these events of slmops on a model, which are sent in the background, and no others.

    `since` leaves out what other tests did before with a model of this name on the same server.
    """
    deadline = time.monotonic() + 120
    asked: dict[str, Any] = {"event": {"prefix": ["slmops."]}, "resource": {"id": [f"slmops.model.{name}"]}}
    if since:
        asked["occurred"] = {"since": since.isoformat()}
    body = {"filter": asked}
    found: set[str] = set()
    while not expected <= found:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
        found = {event["event"] for event in call("POST", f"{server}/events/filter", body)["events"]}
    assert found == expected


def test_the_status_has_runs_under_way_and_the_next_of_each_schedule(slmops: Slmops, server: str) -> None:
    flow = call("POST", f"{server}/flows/", {"name": "gc"})["id"]
    nightly = call("POST", f"{server}/deployments/", {"name": "nightly", "flow_id": flow})["id"]
    # Soon: the status shows no more than 200 scheduled runs, and other tests leave schedules on this server.
    soon, later = (datetime.now(UTC) + timedelta(hours=hours) for hours in (1, 2))
    for due_at, model in ((soon, "home"), (later, "home"), (later, "garden")):
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due_at.isoformat()}}
        asked = {"state": state, "parameters": {"name": model}, "enforce_parameter_schema": False}
        call("POST", f"{server}/deployments/{nightly}/create_flow_run", asked)
    begun = call("POST", f"{server}/flow_runs/", {"flow_id": flow, "name": "under-way", "state": {"type": "RUNNING"}})
    told = slmops.json("status")["prefect"]
    assert [(run["name"], run["state"]) for run in told["runs"] if run["id"] == begun["id"]] == [
        ("under-way", "Running")
    ]
    due = [(run["model"], run["due_at"][:16]) for run in told["due"] if run["deployment"] == "nightly"]
    assert due == [("home", f"{soon:%Y-%m-%dT%H:%M}"), ("garden", f"{later:%Y-%m-%dT%H:%M}")]
    shown = slmops.run("status").stdout
    assert begun["id"] in shown
    assert "nightly of home" in shown
    call("DELETE", f"{server}/deployments/{nightly}")
    call("DELETE", f"{server}/flow_runs/{begun['id']}")


def test_a_variant_below_the_gate_is_not_registered_and_its_run_failed_as_rejected(
    slmops: Slmops, tiny: Path, server: str
) -> None:
    report = slmops.json("deploy", tiny, "--name", "poor", *INT4, "--max-kl-divergence", "0", status=3)
    assert report["status"] == "rejected"
    (variant,) = report["variants"]
    failed = [check for check in variant["gate"]["checks"] if not check["passed"]]
    assert [check["name"] for check in failed] == ["kl_divergence"]
    assert failed[0]["value"] > 0
    assert variant["foundry_model_id"] is None
    assert report["aliases"] == []
    assert not (slmops.home / "foundry" / "models").exists()
    assert "No variant of poor@1 is registered" in slmops.run("chat", "poor", status=2).stderr
    (run,) = query(server, "flow_runs", flow_runs={"name": {"any_": ["deploy-poor"]}})
    assert (run["state"]["type"], run["state"]["name"]) == ("FAILED", "Rejected")
    assert run["state"]["message"] == "poor@1 int4 rejected."
    wait_for_events(server, "poor", {"slmops.version.rejected"})
    logs = query(server, "logs", logs={"flow_run_id": {"any_": [run["id"]]}})
    assert any(log["message"].startswith("int4 was rejected by the gate: kl_divergence ") for log in logs)


def test_cancelling_a_served_run_ends_its_children(slmops: Slmops, tiny: Path, server: str, tmp_path: Path) -> None:
    program = "from slmops.flows.deploy import deploy; deploy.serve(name='deploy', pause_on_shutdown=False)"
    environment = slmops.variables(PREFECT_RUNNER_POLL_FREQUENCY="1")
    environment["PREFECT_HOME"] = str(tmp_path / "prefect")
    with (tmp_path / "serve.log").open("w") as log:
        serving = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "is being served" not in (tmp_path / "serve.log").read_text():
            assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
            time.sleep(0.5)
        run = {"parameters": {"checkpoint": str(tiny), "name": "cancelled"}, "state": {"type": "SCHEDULED"}}
        served = call("GET", f"{server}/deployments/name/deploy/deploy")["id"]  # tests of other flows leave others
        run_id = call("POST", f"{server}/deployments/{served}/create_flow_run", run)["id"]
        deadline = time.monotonic() + 120
        while not (children := children_of(serving.pid)):
            assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
            time.sleep(0.1)
        call("POST", f"{server}/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}, "force": True})
        _, alive = psutil.wait_procs(children, timeout=120)
        assert not alive, (tmp_path / "serve.log").read_text()
        deadline = time.monotonic() + 120
        while call("GET", f"{server}/flow_runs/{run_id}")["state"]["type"] != "CANCELLED":
            assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
            time.sleep(0.5)
        assert not children_of(serving.pid)
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait(timeout=120)
    assert slmops.json("list") == {"models": []}
