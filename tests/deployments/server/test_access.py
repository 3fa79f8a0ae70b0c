"""Who may use the API: the password and the folder it is kept in, the work pools, the embedded server."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from slmops.deployments.server.access import AUTH_FILE, authorization, kept_password, make_password, make_private
from slmops.deployments.server.embedded import SHUTDOWN_TIMEOUT_S, EmbeddedServer
from slmops.deployments.server.registration import deployment_of, read_deployments
from slmops.deployments.server.supervised import Children, Supervised
from slmops.deployments.server.work_pool import ensure_pool, locked
from slmops.infra.errors import BadInput
from tests.support.errors import coded
from tests.support.prefect_api import answer_of

on_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX: file modes")


def modes(folder: Path) -> dict[str, str]:
    return {path.name: oct(path.stat().st_mode & 0o777) for path in (folder, *folder.iterdir())}


class TestThePrivateFolder:
    @on_posix
    def test_what_others_may_do_is_taken_from_it_and_its_content(self, tmp_path: Path) -> None:
        home = tmp_path / "home" / "prefect"
        make_private(home)
        assert modes(home) == {"prefect": "0o700"}
        home.chmod(0o755)
        (home / "prefect.db").write_text("runs")
        (home / "prefect.db").chmod(0o664)
        (home / "storage").mkdir(mode=0o755)
        (home / "elsewhere").symlink_to(tmp_path)
        make_private(home)
        assert modes(home) == {
            **{"prefect": "0o700", "prefect.db": "0o600", "storage": "0o700"},
            "elsewhere": oct(tmp_path.stat().st_mode & 0o777),  # what a link leads to is somebody's decision
        }

    def test_one_that_cannot_be_made_is_refused_by_name(self, tmp_path: Path) -> None:
        (tmp_path / "home").write_text("a file")
        with pytest.raises(BadInput, check=coded("folder-not-private", "prefect")) as refused:
            make_private(tmp_path / "home" / "prefect")
        assert "SLMOPS_HOME" in refused.value.what_to_do


class TestThePassword:
    def test_it_stays_and_only_the_owner_reads_it(self, tmp_path: Path) -> None:
        assert kept_password(tmp_path) is None
        password = make_password(tmp_path)
        assert make_password(tmp_path) == kept_password(tmp_path) == password
        user, _, secret = password.partition(":")
        assert user == "slmops"
        assert len(secret) > 40
        assert [path.name for path in tmp_path.iterdir()] == [AUTH_FILE]
        if os.name == "posix":
            assert modes(tmp_path)[AUTH_FILE] == "0o600"

    def test_commands_that_start_at_once_have_the_same(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(8) as commands:
            made = set(commands.map(lambda _: make_password(tmp_path), range(16)))
        assert made == {kept_password(tmp_path)}
        assert [path.name for path in tmp_path.iterdir()] == [AUTH_FILE]

    def test_an_empty_file_counts_as_missing(self, tmp_path: Path) -> None:
        (tmp_path / AUTH_FILE).touch()
        assert make_password(tmp_path) == kept_password(tmp_path) != ""

    def test_two_homes_have_two(self, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        assert make_password(tmp_path) != make_password(tmp_path / "other")


def test_an_embedded_server_that_is_ended_at_once_ends_by_itself() -> None:
    server = EmbeddedServer()
    begun = time.monotonic()
    server.end()
    assert time.monotonic() - begun < SHUTDOWN_TIMEOUT_S


@pytest.mark.slow
@pytest.mark.runtime
def test_the_embedded_server_answers_its_command_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "prefect"
    make_private(home)
    monkeypatch.setenv("PREFECT_HOME", str(home))
    server = EmbeddedServer()
    try:
        url = server.serve(tmp_path / "log", tmp_path / "templates")
        for said in ({}, {"Origin": "http://page.example"}, authorization("slmops:guessed")):
            answer = answer_of("POST", f"{url}/block_documents/filter", json={"include_secrets": True}, headers=said)
            assert answer.status_code == httpx.codes.UNAUTHORIZED
            assert "access-control-allow-origin" not in answer.headers
        answer = answer_of("POST", f"{url}/flows/filter", json={}, headers=authorization(server.password))
        assert answer.json() == []
        if os.name == "posix":
            assert set(modes(home).values()) == {"0o700", "0o600"}
    finally:
        server.end()
    assert server.password not in (tmp_path / "log").read_text()


class TestTheWorkPool:
    @pytest.fixture
    def client(self, server: str) -> Iterator[SyncPrefectClient]:
        with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
            yield client

    @staticmethod
    def open_pool(client: SyncPrefectClient, name: str, **defaults: Any) -> None:
        template = ProcessWorker.get_default_base_job_template()
        for variable, default in defaults.items():
            template["variables"]["properties"][variable]["default"] = default
        client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))

    def test_a_new_one_lets_nobody_say_what_is_run(self, client: SyncPrefectClient) -> None:
        assert ensure_pool("made") is None
        template = client.read_work_pool("made").base_job_template
        assert set(template["variables"]["properties"]) == {"name", "labels", "stream_output"}
        assert set(template["job_configuration"]) == {"name", "labels", "stream_output"}
        assert ensure_pool("made") is None
        assert client.read_work_pool("made").base_job_template == template

    def test_one_of_the_version_before_is_locked_and_its_owners_defaults_become_fixed(
        self, client: SyncPrefectClient
    ) -> None:
        self.open_pool(client, "before", env={"SLMOPS_STORE__URI": "s3://models/slm"})
        entry = {**read_deployments()[0], "name": "before", "work_pool": {"name": "before"}}
        deployment_of(entry).apply()
        told = ensure_pool("before")
        assert told
        assert "can no longer set their command" in told
        template = client.read_work_pool("before").base_job_template
        assert template["job_configuration"]["env"] == {"SLMOPS_STORE__URI": "s3://models/slm"}
        assert not {"command", "env", "working_dir"} & set(template["variables"]["properties"])
        assert ensure_pool("before") is None

    def test_a_pool_with_other_deployments_stays_and_that_is_reported(self, client: SyncPrefectClient) -> None:
        self.open_pool(client, "shared")
        entry = {**read_deployments()[0], "name": "theirs", "tags": ["team"], "work_pool": {"name": "shared"}}
        deployment_of(entry).apply()
        before = client.read_work_pool("shared").base_job_template
        told = ensure_pool("shared")
        assert told
        assert "(theirs)" in told
        assert client.read_work_pool("shared").base_job_template == before

    def test_one_of_another_type_is_refused(self, client: SyncPrefectClient) -> None:
        client.create_work_pool(WorkPoolCreate(name="containers", type="docker"))
        with pytest.raises(BadInput, check=coded("work-pool-type", "'containers'", "'docker'")):
            ensure_pool("containers")

    def test_settings_of_the_owner_in_the_template_stay(self) -> None:
        template = ProcessWorker.get_default_base_job_template()
        template["job_configuration"]["command"] = "nice python -m prefect.engine"
        assert locked(template)["job_configuration"]["command"] == "nice python -m prefect.engine"


def test_a_failed_restart_is_reported_and_tried_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 1000, 100))
    clock = SimpleNamespace(monotonic=lambda: float(next(times)))  # not the one of all modules and their threads
    monkeypatch.setattr("slmops.deployments.server.supervised.time", clock)
    logs = tmp_path / "logs"
    child = Supervised("The worker", ["version"], dict(os.environ), logs / "worker.log")
    logs.write_text("no folder any more")
    told = child.look_after()
    assert told
    assert "The worker could not be started" in told
    assert "it starts again in 1 s." in told
    assert "it starts again in 2 s." in str(child.look_after())
    logs.unlink()
    assert child.look_after() is None
    assert child.is_running
    child.stop()


def test_no_fault_of_one_pass_ends_the_looking_after() -> None:
    class Faulty(Supervised):
        passes = 0

        def look_after(self) -> str | None:
            self.passes += 1
            if self.passes == 3:
                stopping.set()
                return "seen"
            raise RuntimeError("a fault that nobody thought of")

        def start(self) -> None:
            """Nothing."""

    stopping = threading.Event()
    told: list[str] = []
    with Children(stopping, told.append) as children:
        children.start(Faulty("The worker", [], {}, Path()))
        children.look_after()
    fault = "The worker could not be looked after: RuntimeError: a fault that nobody thought of."
    assert told == [fault, fault, "seen"]
