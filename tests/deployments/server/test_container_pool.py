"""Work pools of containers: their job templates on a real server. No container engine runs here."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.deployments.cli import app as cli
from slmops.deployments.server.container_pool import ENVIRONMENT, PLACEHOLDER, SET_BY_THE_WORKER

SECRET = "{{ prefect.blocks.secret.s3-key }}"


@pytest.fixture
def client(server: str, environment: None, monkeypatch: pytest.MonkeyPatch, home: None) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        monkeypatch.setenv("PREFECT_API_URL", server)
        yield client


def texts_of(part: Any) -> Iterator[str]:
    if isinstance(part, dict | list):
        for each in part.values() if isinstance(part, dict) else part:
            yield from texts_of(each)
    elif isinstance(part, str):
        yield part


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_pool_of_containers_is_fixed_to_its_image_memory_and_variables(
    client: SyncPrefectClient, server: str, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    name = f"{kind}-{uuid4().hex[:6]}"
    variables = ("--env", "SLMOPS_STORE__URI=s3://slm", "--env", f"SLMOPS_STORE__SECRET_ACCESS_KEY={SECRET}")
    asked = ("pool", name, "--type", kind, "--image", "slmops:1", "--memory", "8GB", *variables)
    assert cli.run([*asked, "--limit", "2", "--json"]) == 0, capsys.readouterr()
    made = json.loads(capsys.readouterr().out)
    assert made["is_new"] and made["deployments"] == [f"build-variant/{name}", f"measure-variant/{name}"]
    pool = client.read_work_pool(name)
    assert (pool.type, pool.concurrency_limit) == (kind, 2)
    job = pool.base_job_template["job_configuration"]
    fixed = pool.base_job_template["variables"]["properties"]["env"]
    expected = {"SLMOPS_STORE__URI": "s3://slm", "SLMOPS_STORE__SECRET_ACCESS_KEY": SECRET}
    assert (fixed["default"], fixed["enum"]) == (expected, [expected])
    (container,) = [job] if kind == "docker" else job["job_manifest"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "slmops:1"
    entry_point = job["container_create_kwargs"]["entrypoint"] if kind == "docker" else container["command"]
    assert entry_point == ["/usr/bin/env"]  # that of slmops's image takes no other command
    resources = {"limits": {"memory": "8000000000"}, "requests": {"memory": "8000000000"}}
    assert container["mem_limit"] == "8000000000b" if kind == "docker" else container["resources"] == resources
    placeholders = {found[1] for text in texts_of(job) for found in PLACEHOLDER.finditer(text)}
    assert placeholders <= {*SET_BY_THE_WORKER, ENVIRONMENT}

    deployment = client.read_deployment_by_name(f"build-variant/{name}").id
    for taken in ({"image": "other"}, {"volumes": ["/:/host"]}, {"env": {"A": "1"}}, {"command": "sh"}):
        answer = httpx.post(f"{server}/deployments/{deployment}/create_flow_run", json={"job_variables": taken})
        assert answer.status_code in (409, 422), answer.text

    assert cli.run([*asked, "--json"]) == 0, capsys.readouterr()
    assert not json.loads(capsys.readouterr().out)["is_new"]
    assert client.read_work_pool(name).base_job_template == pool.base_job_template
    client.delete_work_pool(name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--type", "docker", "--image", ""), "has no image"),
        (("--type", "podman", "--image", "slmops:1"), "no work pool of the type 'podman'"),
        (("--type", "docker", "--image", "slmops:1", "--memory", "much"), "'much'"),
        (("--type", "docker", "--image", "slmops:1", "--env", "KEY"), "'KEY' is not NAME=VALUE"),
    ],
)
def test_a_pool_that_could_run_nothing_is_refused(
    client: SyncPrefectClient, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert cli.run(["pool", "boxes", *arguments]) == 2
    assert said in capsys.readouterr().err
