"""A deploy whose variants are built and measured by workers with homes of their own; only the store is common."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import unmeasured_environment
from tests.e2e.conftest import OPEN_GATE, ROOT, SMALL, Slmops
from tests.e2e.test_prefect_server import query
from tests.e2e.up_process import Up
from tests.s3_servers import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("scale-out")]

POOL = "builders"


def build_children(home: Path) -> list[psutil.Process]:
    """The build processes of a worker."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        environment = process.info["environ"] or {}
        if "infra.olive.engine:build" in (process.info["cmdline"] or []) and environment["SLMOPS_HOME"] == str(home):
            found.append(process)
    return found


def runs_of(server: str, name: str) -> list[dict[str, Any]]:
    """The runs that build variants of a model."""
    found = query(server, "flow_runs", flows={"name": {"any_": ["build-variant"]}})
    return [run for run in found if run["parameters"]["name"] == name]


@pytest.fixture
def shared(tmp_path: Path, rclone: S3Server) -> dict[str, str]:
    """The settings that all machines share: one S3 store, one pool."""
    rclone.ensure_bucket("scale-out")
    return {
        **OPEN_GATE,
        **SMALL,
        "SLMOPS_STORE__URI": "s3://scale-out/slm",
        "SLMOPS_STORE__ENDPOINT_URL": rclone.endpoint_url,
        "SLMOPS_STORE__REGION": "us-east-1",
        "SLMOPS_STORE__ACCESS_KEY_ID": rclone.access_key_id,
        "SLMOPS_STORE__SECRET_ACCESS_KEY": rclone.secret_access_key,
        "SLMOPS_SOAK__REQUESTS": "0",
        "SLMOPS_WORKER__POOL": POOL,
        "SLMOPS_MACHINE__THREADS": "1",
    }


@pytest.fixture
def workers(tmp_path: Path, server: str, shared: dict[str, str]) -> Iterator[list[Up]]:
    """Two machines, each with a worker that takes one run at a time."""
    environment = {**unmeasured_environment(), **shared, "PREFECT_API_URL": server}
    ups = [Up(tmp_path / f"machine-{number}", environment) for number in (1, 2)]
    try:
        for up in ups:
            up.start("--pool", POOL)
        for up in ups:
            up.wait_until_ready()
        yield ups
    finally:
        for up in ups:
            up.end()


def test_two_workers_build_at_once_and_one_is_killed(
    tmp_path: Path, server: str, shared: dict[str, str], workers: list[Up], tiny: Path
) -> None:
    deployer = Slmops(tmp_path / "deployer", {**shared, "PREFECT_API_URL": server})
    nobody = deployer.run("deploy", tiny, "--name", "scaled", status=2, SLMOPS_WORKER__POOL="nobody")
    assert "There is no work pool 'nobody'" in nobody.stderr
    assert "slmops up --pool nobody" in nobody.stderr

    command = deployer.command(
        "deploy", tiny, "--name", "scaled", "--json", "--precision", "int4", "--precision", "fp16"
    )
    with subprocess.Popen(command, cwd=ROOT, env=deployer.variables(), stdout=subprocess.PIPE, text=True) as deploying:
        deadline = time.monotonic() + 300
        while not all(build_children(up.home) for up in workers):
            assert deploying.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers[1].kill()
        output = deploying.communicate()[0]
    assert deploying.returncode == 0, output
    assert '"status": "registered"' in output

    runs = runs_of(server, "scaled")
    states = sorted(run["state"]["type"] for run in runs)
    assert states == ["COMPLETED", "COMPLETED", "CRASHED"]
    (crashed,) = [run for run in runs if run["state"]["type"] == "CRASHED"]
    again = [run for run in runs if run["parameters"]["recipe"] == crashed["parameters"]["recipe"]]
    assert len(again) == 2
    listed = deployer.json("list")["models"]
    assert [len(model["variants"]) for model in listed] == [2]
    # The killed machine wrote nothing that could be taken for a version, and its order is gone.
    assert not list((workers[1].home / "cache" / "builds").glob("*.json"))
