"""Whole journeys through the command line, on the demo checkpoint and on tiny ones, each in a home of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.checkpoints import make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
OPEN_GATE = {"SLMOPS_GATE__MIN_TOP1_AGREEMENT": "0", "SLMOPS_GATE__MAX_KL_DIVERGENCE": "1000"}
SMALL = {
    "SLMOPS_EVALUATION__MAX_ROWS": "4",
    "SLMOPS_EVALUATION__MAX_NEW_TOKENS": "12",
    "SLMOPS_BENCHMARK__REPETITIONS": "2",
    "SLMOPS_BENCHMARK__NEW_TOKENS": "8",
}


@dataclass
class Slmops:
    """The command line with a home directory, as a user's shell has it."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def variables(self, **extra: str) -> dict[str, str]:
        """The process environment of a command."""
        return {**os.environ, "SLMOPS_HOME": str(self.home), **self.environment, **extra}

    def run(
        self, *arguments: str | Path, status: int = 0, text: str = "", **extra: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command and check its exit status."""
        done = subprocess.run(
            [sys.executable, "-m", "deployments.cli", *map(str, arguments)],
            cwd=ROOT,
            env=self.variables(**extra),
            capture_output=True,
            text=True,
            input=text,
            check=False,
        )
        assert done.returncode == status, f"{arguments}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str | Path, status: int = 0, **extra: str) -> dict[str, Any]:
        """Run a command with --json; its standard output must be one document."""
        document: dict[str, Any] = json.loads(self.run(*arguments, "--json", status=status, **extra).stdout)
        return document


@pytest.fixture(scope="session")
def demo(demo_home: Path) -> tuple[Slmops, dict[str, Any]]:
    """The command line after `slmops demo`, and the report that it printed."""
    slmops = Slmops(demo_home)
    return slmops, slmops.json("demo")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight Qwen2 checkpoint."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", "qwen2", tied=False)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server on loopback; yields its API's URL."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    # The page asks the API at this address; its default is port 4200.
    interface = {"PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api"}
    environment = {**os.environ, **quiet, **interface, "PREFECT_HOME": str(home)}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}/api"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.2)
        yield url
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


@pytest.fixture
def slmops(tmp_path: Path, server: str) -> Slmops:
    """The command line with an empty home, an open gate and small measurements, and one Prefect server for all."""
    return Slmops(tmp_path / "home", {**OPEN_GATE, **SMALL, "PREFECT_API_URL": server})


@pytest.fixture
def embedded(tmp_path: Path) -> Slmops:
    """The same without a Prefect server."""
    return Slmops(tmp_path / "home", {**OPEN_GATE, **SMALL})
