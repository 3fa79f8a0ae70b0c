"""`slmops up`: everything on one machine, started over the API as the documentation says, by event and by schedule."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from slmops import client
from slmops.deployments.server.automations import DEPLOY_ON_EVENT, LATE_SIGNS, LOST_RUNS, NOT_IN_EVENT
from slmops.infra.errors import BadInput, StageFailed
from tests.conftest import unmeasured_environment
from tests.e2e.conftest import OPEN_GATE, ROOT, SMALL, Slmops
from tests.e2e.up_home import NIGHTLY, SECRET, hostile_folder, make_home_of_the_version_before
from tests.e2e.up_process import Up
from tests.support.errors import coded
from tests.support.prefect_api import answer_of, call, query

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("up")]

API_DOCS = (ROOT / "docs" / "api.md").read_text("utf-8")
ENDED = ("COMPLETED", "FAILED", "CRASHED")
DEADLINE_S = 300  # a hang, not a slow machine, fails here


def example(language: str, after: str) -> str:
    """The first example in a language after a heading of docs/api.md."""
    found = re.search(rf"^## {after}\n.*?^```{language}\n(.*?)^```$", API_DOCS, re.MULTILINE | re.DOTALL)
    assert found, f"docs/api.md has no {language} under {after!r}"
    return found[1]


def run_example(command: list[str], variables: dict[str, str], folder: Path) -> str:
    """Run an example in a folder and return what it prints."""
    done = subprocess.run(command, cwd=folder, env=variables, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(what: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Return the first true value."""
    deadline = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


class Webhook(ThreadingHTTPServer):
    """A chat service that receives notices by HTTP."""

    def __init__(self) -> None:
        notices: list[dict[str, str]] = []
        self.notices = notices

        class Taking(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                notices.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

        super().__init__(("127.0.0.1", 0), Taking)


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, webhook: Webhook) -> Iterator[Up]:
    """A running `slmops up` that started its own server; tests follow each other on it, the last one stops it."""
    folder = tmp_path_factory.mktemp("up")
    home = folder / "home"
    make_home_of_the_version_before(home)
    environment = unmeasured_environment() | OPEN_GATE | SMALL | {"SLMOPS_SOAK__REQUESTS": "0"}
    environment["SLMOPS_NOTICES__WEBHOOK_URL"] = f"http://127.0.0.1:{webhook.server_port}/secret-path"
    environment.pop("PREFECT_API_URL", None)
    started = Up(home, environment, hostile_folder(folder / "hostile"))
    try:
        started.start("--port", "0")
        started.wait_until_ready()
        yield started
    finally:
        started.end()


@pytest.fixture(scope="module")
def api(up: Up) -> str:
    """The API's address, with the required user and password."""
    return up.api_url.replace("://", f"://{up.password}@")


@pytest.fixture
def slmops(up: Up) -> Slmops:
    """Other commands with the same home directory."""
    return Slmops(up.home, {**OPEN_GATE, **SMALL, "SLMOPS_SOAK__REQUESTS": "0"})


def ended_runs(api: str, **parameters: str) -> list[dict[str, Any]]:
    """Runs of `deploy` with these parameters that have ended."""
    runs = query(api, "flow_runs", flows={"name": {"any_": ["deploy"]}})
    return [run for run in runs if parameters.items() <= run["parameters"].items() and run["state"]["type"] in ENDED]


def test_check_finds_what_up_started_without_an_address(up: Up, slmops: Slmops, api: str) -> None:
    wait_for(lambda: slmops.run("up", "--check", status=0) if workers_online(api) else None)
    found = slmops.json("up", "--check")
    assert found["ok"]
    assert found["api_url"] == up.api_url
    whats = {check["what"] for check in found["checks"]}
    names = ("deploy", "retrain", "benchmark", "promote", "rollback", "gc")
    assert {"server", "workers", "work pool slmops", *(f"deployment {name}/{name}" for name in names)} <= whats
    assert {f"automation {name!r}" for name in (DEPLOY_ON_EVENT, LOST_RUNS, LATE_SIGNS)} <= whats


def test_a_second_up_of_the_same_home_says_that_there_is_one(up: Up, slmops: Slmops) -> None:
    assert f"Another slmops up of {up.home} takes runs" in slmops.run("up", status=2).stderr


def workers_online(api: str) -> bool:
    found = call("POST", f"{api}/work_pools/slmops/workers/filter", {})
    return any(worker["status"] == "ONLINE" for worker in found)


FOREIGN_PAGE = {"Origin": "http://page.example"}


@pytest.mark.parametrize("headers", [{}, FOREIGN_PAGE], ids=["another user", "a page in the browser"])
@pytest.mark.parametrize("password", [None, "slmops:guessed"])
def test_a_caller_without_the_password_starts_and_reads_nothing(
    up: Up, headers: dict[str, str], password: str | None
) -> None:
    auth = tuple(password.split(":")) if password else None
    here = up.api_url.replace("://", f"://{up.password}@")
    deployment = call("GET", f"{here}/deployments/name/deploy/deploy")["id"]
    before = len(query(here, "flow_runs"))
    for path, body in (
        (f"deployments/{deployment}/create_flow_run", {"job_variables": {"command": "touch /tmp/ran"}}),
        ("block_documents/filter", {"include_secrets": True}),
        ("events", []),
        ("deployments/filter", {}),
    ):
        # As pages may send it without asking first, and as clients do.
        for sent in ({"json": body}, {"content": json.dumps(body), "headers": {"Content-Type": "text/plain"}}):
            sent["headers"] = {**headers, **sent.get("headers", {})}
            answer = answer_of("POST", f"{up.api_url}/{path}", auth=auth, **sent)
            assert answer.status_code == httpx.codes.UNAUTHORIZED
            assert "access-control-allow-origin" not in answer.headers
    assert len(query(here, "flow_runs")) == before


def test_no_page_of_another_origin_may_ask(up: Up, api: str) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    asked = answer_of("OPTIONS", f"{up.api_url}/deployments/filter", headers={**FOREIGN_PAGE, **wanted})
    assert asked.status_code == 400
    assert "access-control-allow-origin" not in asked.headers
    # Who has the password is no page.
    answer = answer_of("GET", f"{api}/version", headers=FOREIGN_PAGE).raise_for_status()
    assert "access-control-allow-origin" not in answer.headers
    ui = call("GET", f"{up.api_url.removesuffix('/api')}/ui-settings")
    assert (ui["auth"], ui["api_url"]) == ("BASIC", "/api")


@pytest.mark.parametrize("subprotocols", [[], ["prefect"]])
def test_no_event_is_taken_by_a_socket_without_the_password(up: Up, subprotocols: list[Any]) -> None:
    address = up.api_url.replace("http://", "ws://") + "/events/in"
    with pytest.raises((ConnectionClosed, InvalidStatus)), connect(address, subprotocols=subprotocols) as socket:
        socket.send(json.dumps({"type": "auth", "token": "slmops:guessed"}))
        socket.recv()
        socket.recv()


@pytest.mark.parametrize(
    "variables",
    [
        {"command": "touch ran"},
        {"env": {"PYTHONPATH": "/tmp"}},
        {"env.LD_PRELOAD": "/tmp/library.so"},
        {"working_dir": "/tmp"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_no_client_sets_the_command_of_a_worker(api: str, variables: dict[str, Any]) -> None:
    deployment = call("GET", f"{api}/deployments/name/deploy/deploy")["id"]
    body = {"parameters": {"checkpoint": "here", "name": "by-caller"}, "job_variables": variables}
    answer = answer_of("POST", f"{api}/deployments/{deployment}/create_flow_run", json=body)
    assert answer.status_code == 422
    assert f"'{next(iter(variables))}' was unexpected" in answer.json()["detail"]
    runs = query(api, "flow_runs", deployments={"id": {"any_": [deployment]}})
    assert [run for run in runs if run["parameters"].get("name") == "by-caller"] == []


def test_a_home_of_the_version_before_is_taken_over(up: Up, api: str) -> None:
    assert "Deployment deploy/deploy: updated." in up.log.read_text()
    for name in ("deploy", "gc"):
        found = call("GET", f"{api}/deployments/name/{name}/{name}")
        assert (found["entrypoint"], found["job_variables"]) == (f"slmops.flows.{name}.{name}", {})
    (schedule,) = found["schedules"]  # the user's own stays
    assert NIGHTLY.items() <= schedule["schedule"].items()
    (secret,) = query(api, "block_documents", include_secrets=True, block_documents={"name": {"any_": ["kept"]}})
    assert secret["data"]["value"] == SECRET
    if os.name == "posix":
        home = up.home / "prefect"
        assert [path.name for path in (home, *home.iterdir()) if path.stat().st_mode & 0o077] == []


def test_check_reports_what_is_missing(slmops: Slmops, tmp_path: Path) -> None:
    found = slmops.json("up", "--check", "--pool", "nobody", status=1)
    (missing,) = [check for check in found["checks"] if not check["ok"]]
    assert (missing["what"], missing["what_to_do"]) == ("work pool nobody", "slmops up --pool nobody")
    nothing = Slmops(tmp_path / "elsewhere").json("up", "--check", status=1)
    assert [check["what"] for check in nothing["checks"]] == ["server"]
    assert not (tmp_path / "elsewhere").exists()


def test_the_documented_calls_deploy_once_and_fetch_the_report(up: Up, api: str, tiny: Path, tmp_path: Path) -> None:
    variables = {**up.environment, **up.client, "CHECKPOINT": str(tiny), "NAME": "by-api"}
    with_curl = run_example(["sh", "-c", example("sh", "curl")], variables, tmp_path)
    assert "by-api@1 int4 registered." in with_curl
    assert "# by-api@1" in with_curl
    with_python = run_example([sys.executable, "-c", example("python", "Python")], variables, tmp_path)
    # The same idempotency key: the same run and its report, and no other.
    assert with_curl.splitlines()[0] == with_python.splitlines()[0]
    assert "# by-api@1" in with_python
    assert with_curl.splitlines()[-1] == with_python.splitlines()[-1] == "selected int4"
    assert len(ended_runs(api, name="by-api")) == 1


def test_a_parameter_of_the_wrong_type_is_refused_by_name(api: str) -> None:
    deployment = call("GET", f"{api}/deployments/name/deploy/deploy")["id"]
    body = {"parameters": {"checkpoint": "here", "name": 7}}
    answer = answer_of("POST", f"{api}/deployments/{deployment}/create_flow_run", json=body)
    assert answer.status_code == 409
    assert "field 'name'" in answer.json()["detail"]
    fields = call("GET", f"{api}/deployments/{deployment}")["parameter_openapi_schema"]["properties"]
    assert {**fields["evaluation_file"], "description": ""} == {
        "title": "evaluation_file",
        "type": "string",
        "position": 3,
        "description": "",
    }


def test_an_event_deploys_its_checkpoint(up: Up, api: str, tiny: Path) -> None:
    program = f"from slmops.events import checkpoint_ready; checkpoint_ready({str(tiny)!r}, 'by-api', 'run-7')"
    environment = {**up.environment, **up.client}
    before = len(ended_runs(api, name="by-api"))
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
    wait_for(lambda: len(ended_runs(api, name="by-api")) > before)
    runs = [run for run in ended_runs(api, name="by-api") if run["parameters"].get("training_run") == "run-7"]
    # On a busy machine SQLite may lock one automation out; the server then hands the event to all of them again.
    assert [run["state"] for run in runs if run["state"]["type"] != "COMPLETED"] == []
    assert {run["created_by"]["type"] for run in runs} == {"AUTOMATION"}


def test_a_command_runs_on_the_server_and_follows(
    up: Up, slmops: Slmops, api: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remotely = ("deploy", os.path.relpath(tiny, ROOT), "--name", "by-api", "--precision", "int4", "--remote")
    done = slmops.run(*remotely, "--json")
    report = json.loads(done.stdout)
    assert (report["name"], report["selected"]) == ("by-api", "int4")
    run_id = re.findall(r"^Run: \S+/flow-run/(\S+)$", done.stderr, re.MULTILINE)[0]
    run = call("GET", f"{api}/flow_runs/{run_id}")
    given = Path(run["parameters"]["checkpoint"])
    assert given.is_absolute() and given.samefile(tiny)
    for variable, value in up.client.items():
        monkeypatch.setenv(variable, value)
    assert client.wait_for(run_id) == report
    followed = slmops.run("logs", "-f", run_id).stdout.splitlines()
    assert followed[-1].startswith(f"Completed: by-api@{report['version']} ")
    assert any("int4 passed the gate" in line for line in followed)

    refused = slmops.run("deploy", tiny, "--name", "Other", "--remote", status=2)
    assert "Validation failed for field 'name'" in refused.stderr
    missing = slmops.run("deploy", tmp_path / "nowhere", "--name", "other", "--remote", status=1)
    assert f"There is no such folder: {tmp_path / 'nowhere'}" in missing.stderr
    assert {found["name"] for found in slmops.json("list")["models"]} == {"by-api"}


def test_an_event_without_a_checkpoint_is_refused_and_a_notice_goes_out(
    up: Up, api: str, slmops: Slmops, webhook: Webhook
) -> None:
    script = re.search(r"^curl [^\n]*/events\".*?^\}\]'$", API_DOCS, re.MULTILINE | re.DOTALL)
    assert script
    without = script[0].replace('"checkpoint": "\'"$CHECKPOINT"\'", ', "")
    assert without != script[0]
    variables = {**up.environment, **up.client, "NAME": "by-event"}
    subprocess.run(["sh", "-c", without], env=variables, check=True)
    run = wait_for(lambda: ended_runs(api, name="by-event"))[0]
    assert run["state"]["type"] == "FAILED"
    assert NOT_IN_EVENT in run["state"]["message"]
    refusals = wait_for(lambda: [message for message in messages_of(api, run) if NOT_IN_EVENT in message])  # sent later
    assert len(refusals) == 1
    assert [message for message in messages_of(api, run) if "Traceback" in message] == []
    assert {model["name"] for model in slmops.json("list")["models"]} <= {"by-api"}
    notices = wait_for(lambda: [notice for notice in webhook.notices if notice["subject"] == "deploy-by-event"])
    assert {notice["event"] for notice in notices} == {"prefect.flow-run.Failed"}
    assert all(NOT_IN_EVENT in notice["message"] for notice in notices)
    written = [up.log, *(up.home / "cache" / "logs").glob("prefect-*.log")]
    assert len(written) == 3
    for log in written:
        assert "secret-path" not in log.read_text("utf-8")
        assert up.password not in log.read_text("utf-8")


def messages_of(api: str, run: dict[str, Any]) -> list[str]:
    """The log messages of a run's flow and its engine."""
    logs = query(api, "logs", logs={"flow_run_id": {"any_": [run["id"]]}})
    return [log["message"] for log in logs if log["name"] == "prefect.flow_runs"]


def test_a_training_script_starts_a_deploy_and_cancelling_it_ends_its_children(
    up: Up, slmops: Slmops, api: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in up.client.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BadInput, check=coded("call-refused", "'int3'")):
        client.start_deploy(str(tiny), "cancelled", precisions=["int3"])
    # With a temperature of its own it is another build than those before.
    run = client.start_deploy(str(tiny), "cancelled", precisions=["fp16"], temperature=0.4)

    wait_for(lambda: list((up.home / "cache" / "logs").glob("build-cancelled-fp16-*.log")))
    children = [process for process in up.tree if "slmops.infra.process.child" in command_line(process)]
    assert children
    (engine,) = [process for process in up.tree if command_line(process)[1:] == ["-m", "prefect.engine"]]
    environment = engine.environ()
    # A folder of its own that is empty, which Prefect names, and none that somebody could have written.
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["PYTHONPATH"] == engine.cwd()
    assert list(Path(engine.cwd()).iterdir()) == []
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    call("POST", f"{api}/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert slmops.run("logs", "-f", run, status=1).stdout.splitlines()[-1].startswith("Cancelled")
    with pytest.raises(StageFailed):
        client.wait_for(run)
    assert call("GET", f"{api}/flow_runs/{run}")["state"]["type"] == "CANCELLED"
    assert not any(child.is_running() for child in children)
    assert list((up.home / "cache" / "work").glob("*")) == []


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


def test_a_schedule_starts_a_real_retrain(slmops: Slmops, api: str, tiny: Path, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"say {word}"}], "expected": f"{word} {word}"}
        for word in ("add", "print", "def", "return", "hello", "world", "good")
    ]
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps({"id": index, **chat}) + "\n" for index, chat in enumerate(chats)), "utf-8")
    parameters = {
        **{"dataset": str(rows), "base": str(tiny), "name": "nightly", "evaluation_file": str(rows)},
        **{"epochs": 1, "precisions": ["int4"]},
    }
    deployment = call("GET", f"{api}/deployments/name/retrain/retrain")["id"]
    soon = {"cron": "* * * * * */20", "timezone": "Europe/Berlin"}  # its last field is seconds
    body = [{"schedule": soon, "active": True, "parameters": parameters}]
    (made,) = call("POST", f"{api}/deployments/{deployment}/schedules", body)

    def runs(*states: str) -> list[dict[str, Any]]:
        found = query(api, "flow_runs", deployments={"id": {"any_": [deployment]}})
        return [run for run in found if run["state"]["type"] in states]

    wait_for(lambda: runs("RUNNING", *ENDED))
    call("DELETE", f"{api}/deployments/{deployment}/schedules/{made['id']}")
    run = wait_for(lambda: runs(*ENDED))[0]  # where it started late, another may wait for it
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert run["auto_scheduled"]
    assert "nightly@1 is the first champion" in run["state"]["message"]
    assert slmops.json("show", "nightly@champion")["version"] == 1


def test_a_schedule_without_future_times_is_reported(slmops: Slmops, api: str) -> None:
    deployment = call("GET", f"{api}/deployments/name/gc/gc")["id"]
    past = {"rrule": "DTSTART:20200101T000000\nRRULE:FREQ=DAILY;COUNT=1", "timezone": "UTC"}
    call("POST", f"{api}/deployments/{deployment}/schedules", [{"schedule": past, "active": True}])
    found = slmops.json("up", "--check", status=1)
    (missing,) = [check for check in found["checks"] if not check["ok"]]
    assert missing["what"] == "schedule of gc/gc"
    assert "never" in missing["found"]


def test_a_signal_ends_all_that_was_started(up: Up, slmops: Slmops) -> None:
    assert not (up.folder / "ran").exists()  # nothing of the folder that it was started in, all the time
    tree = up.tree
    assert len(tree) > 2
    up.process.terminate()
    assert up.process.wait(120) == 0
    assert psutil.wait_procs(tree, timeout=120)[1] == []
    assert slmops.json("up", "--check", status=1)["api_url"] is None
    assert json.loads(slmops.run("list", "--json").stdout)["models"]
    assert (up.home / "prefect" / "prefect.db").is_file()  # its database is kept, with all runs
