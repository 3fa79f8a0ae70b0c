"""Promotions and rollbacks of really deployed versions: all changes are made, or none."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.foundry.registration import registered_models
from tests.e2e.conftest import OPEN_GATE, ROOT, SMALL, Slmops, SlmopsHere
from tests.e2e.test_deploy import INT4
from tests.e2e.test_prefect_server import wait_for_events
from tests.e2e.test_store import other_content
from tests.support.model_server import ModelServer
from tests.support.prefect_api import query
from tests.support.served_models import serving
from tests.support.versions import add_evidence, latest_evidence

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("promotion")]


HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def begun() -> datetime:
    """When this module's tests began on the server, which other modules share."""
    return datetime.now(UTC)


@pytest.fixture(scope="module")
def deployed(tiny: Path, tmp_path_factory: pytest.TempPathFactory, server: str, begun: datetime) -> Slmops:
    """The command line of a home with home@1, the champion, and home@2, the candidate."""
    home = tmp_path_factory.mktemp("promotion") / "home"
    slmops = SlmopsHere(home, {**OPEN_GATE, **SMALL, "PREFECT_API_URL": server})
    for number in (1, 2):
        report = slmops.json("deploy", tiny, "--name", "home", *INT4, *other_content(number))
        assert (report["version"], report["status"]) == (number, "registered")
    return slmops


@pytest.fixture
def slmops(deployed: Slmops) -> Slmops:
    """The same with home@1 as the champion."""
    deployed.run("promote", "home@1")
    assert holds(deployed) == {"alias": 1, "foundry": ["home:1"]}
    return deployed


@pytest.fixture
def model_server(slmops: Slmops) -> Iterator[ModelServer]:
    with ModelServer({"home": 1}).running(slmops.home) as running:
        yield running


def registry_of(slmops: Slmops) -> ModelRegistry:
    return open_registry(Settings(home=slmops.home))


def holds(slmops: Slmops) -> dict[str, Any]:
    """Return the champion according to the store and to Foundry Local."""
    registered = registered_models(Settings(home=slmops.home))
    ids = [model.model_id for model in registered if model.name == "home"]
    assert all(model.folder_exists for model in registered)
    return {"alias": registry_of(slmops).alias("home", "champion"), "foundry": ids}


def folder_of(slmops: Slmops, version: int) -> Path:
    return slmops.home / "foundry" / "models" / "custom" / "home-int4" / f"v{version}"


def test_there_and_back(slmops: Slmops, model_server: ModelServer, server: str, begun: datetime) -> None:
    changes = len(slmops.json("history", "home")["history"])
    registry_of(slmops).set_alias("home", "candidate", 2, "deployed later")
    done = slmops.json("promote", "home@candidate", "--reason", "knows the garage")
    told = {"name": "home", "version": 2, "former": 1, "status": "promoted", "servers": 1, "reason": "knows the garage"}
    assert told.items() <= done.items()
    assert (done["precision"], done["foundry_model_id"]) == ("int4", "home:2")
    assert done["proof"]["model_id"] == "home-int4-generic-cpu:2"
    assert holds(slmops) == {"alias": 2, "foundry": ["home:2"]}
    assert (model_server.models, model_server.asked) == ({"home": 2}, [("home", 2, "int4")])
    assert registry_of(slmops).aliases("home") == {"champion": 2}  # a candidate no more
    assert slmops.json("show", "home")["version"] == 2

    again = slmops.json("promote", "home@2")
    assert (again["status"], again["former"], again["servers"]) == ("unchanged", 2, 0)
    assert len(model_server.asked) == 1

    back = slmops.json("rollback", "home", "--reason", "forgot the kitchen")
    assert (back["status"], back["version"], back["former"]) == ("rolled back", 1, 2)
    assert holds(slmops) == {"alias": 1, "foundry": ["home:1"]}
    assert model_server.models == {"home": 1}
    there = slmops.run("rollback", "home", "--to", "2").stdout
    assert "home@2 is the champion, after home@1, and 1 running server took it over." in there
    assert holds(slmops) == {"alias": 2, "foundry": ["home:2"]}

    history = slmops.json("history", "home")
    assert history["champion"] == 2
    newest = history["history"][: len(history["history"]) - changes]
    assert [(change["version"], change["former"], change["rolled_back"]) for change in newest] == [
        (2, 1, True),
        (1, 2, True),
        (2, 1, False),
    ]
    assert [change["reason"] for change in newest] == [
        "rolled back from home@1",
        "forgot the kitchen",
        "knows the garage",
    ]
    assert "knows the garage" in slmops.run("history", "home").stdout
    asked = {"artifacts": {"key": {"any_": ["slmops-promotion-home"]}}, "sort": "CREATED_DESC"}
    artifacts = query(server, "artifacts", **asked)
    assert any("knows the garage" in artifact["data"] for artifact in artifacts)
    told = ("champion.promoted", "champion.rolled-back", "version.registered")
    wait_for_events(server, "home", {f"slmops.{event}" for event in told}, since=begun)


def test_a_running_servers_clients_see_no_failure(slmops: Slmops) -> None:
    served: list[str] = []
    failures: list[Exception] = []
    ending = threading.Event()
    with serving(slmops.home, "home", environment=slmops.environment) as running:

        def ask_without_pause() -> None:
            client = running.client()
            while not ending.is_set():
                try:
                    answered = client.chat.completions.create(model="home", messages=HELLO, max_tokens=4)
                    served.append(answered.model)
                except Exception as error:
                    failures.append(error)

        asking = [threading.Thread(target=ask_without_pause) for _ in range(2)]
        for thread in asking:
            thread.start()
        try:
            for arguments, model in ((("promote", "home@2"), "home:2"), (("rollback", "home"), "home:1")):
                assert slmops.json(*arguments)["servers"] == 1
                assert running.client().chat.completions.create(model="home", messages=HELLO).model == model
        finally:
            ending.set()
            for thread in asking:
                thread.join(60)
    assert failures == []
    changes = [model for model, before in zip(served, ["", *served], strict=False) if model != before]
    assert set(served) == {"home:1", "home:2"}
    assert (served[0], served[-1]) == ("home:1", "home:1"), changes


def test_a_version_with_another_answer_than_its_proof_leaves_the_old_one_serving(
    slmops: Slmops, model_server: ModelServer
) -> None:
    registry = registry_of(slmops)
    second = registry.version("home", 2).manifest
    proof = latest_evidence(registry, second, "proof-int4")
    assert proof is not None
    proof.pop("recorded_at")
    before = slmops.json("history", "home")
    add_evidence(registry, second, "proof-int4", {**proof, "answer": "something else"})
    try:
        error = slmops.run("promote", "home@2", status=1).stderr
        document = slmops.json("promote", "home@2", status=1)
    finally:
        add_evidence(registry, second, "proof-int4", proof)
    assert "home@2 was not promoted: Through Foundry Local home-int4-generic-cpu:2 answers" in error
    assert "it answered 'something else'. home@1 still is the champion." in error
    assert "home@1 still is the champion." in document["error"]["message"]
    assert "Traceback" not in error
    assert holds(slmops) == {"alias": 1, "foundry": ["home:1"]}
    assert (model_server.models, model_server.asked) == ({"home": 1}, [])
    assert slmops.json("history", "home") == before
    assert "home-int4-generic-cpu:2" in {model.model_id for model in registered_models(Settings(home=slmops.home))}
    assert slmops.json("promote", "home@2")["status"] == "promoted"


def test_a_folder_that_is_missing_or_replaced_is_made_again_from_the_store(slmops: Slmops) -> None:
    shutil.rmtree(folder_of(slmops, 2))
    assert slmops.json("promote", "home@2")["status"] == "promoted"
    config = folder_of(slmops, 1) / "genai_config.json"
    whole = config.read_bytes()
    config.unlink()  # a hard link to the store's
    config.write_bytes(whole + b"\n")
    assert slmops.json("rollback", "home", "--to", "1")["status"] == "rolled back"
    assert config.read_bytes() == whole


def test_a_file_that_was_altered_in_folder_and_store_is_refused(slmops: Slmops) -> None:
    weights = folder_of(slmops, 2) / "genai_config.json"
    whole, mode = weights.read_bytes(), weights.stat().st_mode
    weights.chmod(mode | stat.S_IWRITE)
    try:
        weights.write_bytes(whole.replace(b"\n", b" \n", 1))  # the store's blob is the same file
        error = slmops.run("promote", "home@2", status=1).stderr
    finally:
        weights.write_bytes(whole)
        weights.chmod(mode)
    assert "home@2 was not promoted: genai_config.json of home@2 int4 was altered. home@1 still is" in error
    assert "slmops verify home@2" in error
    assert holds(slmops) == {"alias": 1, "foundry": ["home:1"]}


def test_a_server_that_refuses_has_everything_undone(slmops: Slmops, model_server: ModelServer) -> None:
    before = slmops.json("history", "home")
    refusing = ModelServer({"home": 1})
    refusing.refuses.add(2)
    with refusing.running(slmops.home, "zzz"):  # asked after the other one
        error = slmops.run("promote", "home@2", status=1).stderr
    assert f"home@2 was not promoted: The server at {refusing.url} refused: The new version does not fit" in error
    assert "home@1 still is the champion." in error
    assert "Not restored" not in error
    assert (refusing.models, model_server.models) == ({"home": 1}, {"home": 1})
    assert model_server.asked == [("home", 2, "int4"), ("home", 1, "int4")]
    assert holds(slmops) == {"alias": 1, "foundry": ["home:1"]}
    assert slmops.json("history", "home") == before


def end_in_a_hand_over(slmops: Slmops, model_server: ModelServer, number: signal.Signals) -> str:
    """Promote home@2, end the process during the hand-over, and return its output."""
    model_server.waits.clear()
    model_server.reached.clear()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may run where it is ignored
    command = [sys.executable, "-m", "slmops", "promote", "home@2"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=slmops.variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    signal.signal(signal.SIGINT, handler)
    assert model_server.reached.wait(120)
    process.send_signal(number)
    if number != signal.SIGKILL:
        model_server.waits.set()
    said, _ = process.communicate(timeout=120)
    model_server.waits.set()
    assert process.returncode != 0
    return said


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_promotion_is_undone(slmops: Slmops, model_server: ModelServer, number: signal.Signals) -> None:
    said = end_in_a_hand_over(slmops, model_server, number)
    assert "Traceback" not in said
    assert holds(slmops) == {"alias": 1, "foundry": ["home:1"]}
    assert model_server.models == {"home": 1}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("then", [1, 2])
def test_after_a_killed_promotion_the_next_one_ends_right(slmops: Slmops, model_server: ModelServer, then: int) -> None:
    before = slmops.json("history", "home")["history"]
    end_in_a_hand_over(slmops, model_server, signal.SIGKILL)
    assert holds(slmops) == {"alias": 1, "foundry": ["home:2"]}  # the alias, written last, decides
    told = " ".join(slmops.run("list").stderr.split())
    assert "The promotion of home@2 was interrupted" in told and "slmops promote home@1" in told
    done = slmops.json("promote", f"home@{then}")
    assert (done["status"], done["version"], done["former"]) == ("promoted", then, 1)
    assert holds(slmops) == {"alias": then, "foundry": [f"home:{then}"]}
    assert model_server.models == {"home": then}
    assert slmops.json("promote", f"home@{then}")["status"] == "unchanged"
    history = slmops.json("history", "home")["history"]
    assert [change["version"] for change in history][: then - 1] == [2][: then - 1]
    assert history[then - 1 :] == before


def test_a_deploy_that_promotes_changes_everything_or_nothing(
    slmops: Slmops, model_server: ModelServer, tiny: Path
) -> None:
    deploying = ("deploy", tiny, "--name", "home", *INT4, *other_content(2), "--promote")
    before = slmops.json("history", "home")
    refusing = ModelServer({"home": 1})
    refusing.refuses.add(2)
    with refusing.running(slmops.home, "zzz"):  # asked after the other one
        error = slmops.json(*deploying, status=1)["error"]
    assert (
        f"home@2 was not promoted: The server at {refusing.url} refused: The new version does not" in error["message"]
    )
    assert error["message"].endswith("home@1 still is the champion.")
    assert (model_server.models, refusing.models) == ({"home": 1}, {"home": 1})
    assert holds(slmops) == {"alias": 1, "foundry": ["home:1"]}
    assert slmops.json("history", "home") == before
    report = (slmops.home / "reports" / "home@2.md").read_text("utf-8")
    assert "home@2 was not promoted" in report

    report = slmops.json(*deploying)
    assert (report["status"], report["aliases"], report["foundry_model_id"]) == ("unchanged", ["champion"], "home:2")
    assert model_server.models == {"home": 2}
    assert holds(slmops) == {"alias": 2, "foundry": ["home:2"]}
