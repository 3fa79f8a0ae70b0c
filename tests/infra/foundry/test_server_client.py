"""Running servers are found and queried, and their refusals are reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.infra.errors import StageFailed
from slmops.infra.foundry.server_client import RunningServer, running_servers
from slmops.infra.storage.holders import this_process
from tests.support.errors import coded
from tests.support.model_server import TOKEN, ModelServer

HOLDER = "from slmops.infra.storage.holders import this_process; print(this_process())"


def describe(home: Path, file: str, **changes: str) -> Path:
    record = {"process": this_process(), "url": "http://127.0.0.1:9", "control_token": TOKEN, **changes}
    path = home / "serve" / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), "utf-8")
    return path


def test_servers_of_processes_that_have_ended_are_skipped(tmp_path: Path) -> None:
    assert running_servers(tmp_path) == []
    ended = subprocess.run([sys.executable, "-c", HOLDER], capture_output=True, text=True, check=True).stdout.strip()
    describe(tmp_path, "ended", process=ended)
    describe(tmp_path, "alive", url="http://127.0.0.1:4711/")
    (server,) = running_servers(tmp_path)
    assert server.url == "http://127.0.0.1:4711"
    assert TOKEN not in repr(server)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"process": 1}'])
def test_a_file_that_names_no_server_is_named(content: str, tmp_path: Path) -> None:
    path = describe(tmp_path, "broken")
    path.write_text(content)
    with pytest.raises(StageFailed, check=coded("server-file-not-valid", "broken.json")):
        running_servers(tmp_path)


def test_a_hand_over_is_done_or_refused_with_the_servers_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # the token is not for a proxy
    with ModelServer({"home": 2}).running(tmp_path) as server:
        (running,) = running_servers(tmp_path)
        assert (running.serves("home"), running.serves("away")) == (2, None)
        assert running.hand_over("home", 3, "int4") == 2
        assert (running.serves("home"), server.asked) == (3, [("home", 3, "int4")])
        server.refuses.add(4)
        with pytest.raises(StageFailed, check=coded("server-refused", "does not fit into memory")) as caught:
            running.hand_over("home", 4, "int8")
        assert (caught.value.what_to_do, running.serves("home")) == ("Free some.", 3)
        with pytest.raises(StageFailed, check=coded("server-refused", "token is wrong")):
            RunningServer(running.url, "another").serves("home")
    with pytest.raises(StageFailed, check=coded("server-unreachable")):
        running.serves("home")


def test_a_server_that_takes_too_long_has_not_handed_over(tmp_path: Path) -> None:
    with ModelServer({"home": 1}).running(tmp_path) as server:
        server.waits.clear()
        (running,) = running_servers(tmp_path, hand_over_timeout_s=0.2)
        with pytest.raises(StageFailed, check=coded("server-unreachable", "timed out")):
            running.hand_over("home", 2, "int4")


def test_an_answer_that_is_not_json_is_reported_by_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelServer({}).running(tmp_path) as server:
        monkeypatch.setattr(server, "answer", lambda *_: (500, ["no", "document"]))
        (running,) = running_servers(tmp_path)
        with pytest.raises(StageFailed, check=coded("server-refused", "status 500")):
            running.serves("home")
