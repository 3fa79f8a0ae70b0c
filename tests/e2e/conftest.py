"""Whole journeys through the command line, on the demo checkpoint and on tiny ones, each in its own home."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from slmops.deployments.cli import app
from slmops.infra.process import supervisor
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks import workshop
from tests.conftest import unmeasured_environment
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.chromium import CHROMIUM, DRIVER, Browser, chromium
from tests.support.genai_models import build_genai_model
from tests.support.real_models import real_model
from tests.support.served_models import RunningServer, serving, store_model
from tests.support.torch_process import TORCH_PROCESS, ProcessThatStays
from tests.support.versions import add_evidence

ROOT = Path(__file__).resolve().parents[2]
OPEN_GATE = {"SLMOPS_GATE__MIN_TOP1_AGREEMENT": "0", "SLMOPS_GATE__MAX_KL_DIVERGENCE": "1000"}
# Every stage does its work, on little: the demo's journey and tests/infra have the sizes that users have.
SMALL = {
    "SLMOPS_EVALUATION__MAX_ROWS": "4",
    "SLMOPS_EVALUATION__MAX_NEW_TOKENS": "12",
    "SLMOPS_BENCHMARK__PROMPT_TOKENS": "[16]",
    "SLMOPS_BENCHMARK__REPETITIONS": "2",
    "SLMOPS_BENCHMARK__NEW_TOKENS": "8",
    "SLMOPS_SOAK__REQUESTS": "8",
    "SLMOPS_SWEEP__MAX_PROMPT_TOKENS": "64",
    "SLMOPS_SWEEP__REPETITIONS": "1",
}


@dataclass
class Slmops:
    """The command line with a home directory, as in a user's shell."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def variables(self, **extra: str) -> dict[str, str]:
        """The process environment of a command."""
        return {**unmeasured_environment(), "SLMOPS_HOME": str(self.home), **self.environment, **extra}

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line of a command."""
        return [sys.executable, "-m", "slmops", *map(str, arguments)]

    def run(
        self, *arguments: str | Path, status: int = 0, text: str = "", **extra: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command and check its exit status."""
        done = subprocess.run(
            self.command(*arguments),
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


class SlmopsHere(Slmops):
    """The command line in this process, with its imports done, on the Prefect server of all tests.

    What is particular to a process of its own (signals, its standard streams, what it imports, what of the user's
    environment it heeds) is shown by the tests that start one.
    """

    def run(
        self, *arguments: str | Path, status: int = 0, text: str = "", **extra: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command and check its exit status."""
        out, err = io.StringIO(), io.StringIO()
        variables = self.variables(**extra)
        server = {PREFECT_API_URL: variables["PREFECT_API_URL"], PREFECT_LOGGING_TO_API_ENABLED: True}
        with (
            mock.patch.dict(os.environ, variables, clear=True),
            mock.patch("sys.stdin", io.StringIO(text)),
            mock.patch.object(workshop, "torch_process", lambda _settings: TORCH_PROCESS),
            mock.patch.object(supervisor, "ChildProcess", ProcessThatStays),
            redirect_stdout(out),
            redirect_stderr(err),
            temporary_settings(server),
        ):
            returned = app.run([str(argument) for argument in arguments])
            APILogHandler().flush()
        done = subprocess.CompletedProcess(self.command(*arguments), returned, out.getvalue(), err.getvalue())
        assert returned == status, f"{arguments}: status {returned}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="session")
def demo(demo_home: Path, server: str) -> tuple[Slmops, dict[str, Any]]:
    """The command line after `slmops demo`, as somebody's first command, and the report that it printed."""
    return SlmopsHere(demo_home, {"PREFECT_API_URL": server}), Slmops(demo_home).json("demo")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight Qwen2 checkpoint with a short context, whose end the edge inputs reach soon."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    return make_tiny_checkpoint(folder, "qwen2", tied=False, max_position_embeddings=512)


@pytest.fixture(scope="session")
def tool_caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has learned to call two tools, with Qwen3's own chat template; read only."""
    folder = tmp_path_factory.mktemp("caller")
    settings = json.loads((real_model("tokenizers/qwen3") / "tokenizer_config.json").read_text("utf-8"))
    (folder / "template.jinja").write_text(settings["chat_template"], "utf-8")
    command = [sys.executable, "-m", "tests.support.tool_caller", folder / "checkpoint", folder / "template.jinja"]
    subprocess.run(command, env=unmeasured_environment(), check=True, cwd=ROOT)
    return folder / "checkpoint"


@pytest.fixture
def slmops(tmp_path: Path, server: str) -> Slmops:
    """The command line with an empty home, an open gate and small measurements, and one Prefect server for all."""
    return SlmopsHere(tmp_path / "home", {**OPEN_GATE, **SMALL, "PREFECT_API_URL": server})


@pytest.fixture
def embedded(tmp_path: Path) -> Slmops:
    """The same without a Prefect server."""
    return Slmops(tmp_path / "home", {**OPEN_GATE, **SMALL})


@pytest.fixture(scope="session")
def served_model_dir(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real int4 model of 0.1 M parameters with a context of 1,024 tokens."""
    return build_genai_model(tiny_checkpoint, tmp_path_factory.mktemp("served") / "model", "int4")


@pytest.fixture(scope="session")
def served_home(served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with three versions of `home`, the third one damaged, and one of `other`, whose answers have a schema."""
    home = tmp_path_factory.mktemp("served-home") / "home"
    registry = ModelRegistry(LocalObjectStore(home / "store"))
    for number in (1, 2):
        store_model(registry, served_model_dir, home / f"in/{number}", content=str(number))
    broken = shutil.copytree(served_model_dir, home / "in/broken")
    config = json.loads((broken / "genai_config.json").read_bytes())
    config["model"]["decoder"]["inputs"]["input_ids"] = "nobody"
    (broken / "genai_config.json").write_text(json.dumps(config), "utf-8")
    store_model(registry, broken, home / "in/3")
    other = store_model(registry, served_model_dir, home / "in/other", name="other")
    add_evidence(registry, other, "response-format", {"json_schema": {"enum": ["on", "off"]}})
    shutil.rmtree(home / "in")
    return home


@pytest.fixture(scope="session")
def model_server(served_home: Path) -> Iterator[RunningServer]:
    """One server for all tests that do not change it; pages of http://localhost:3000 may use it."""
    with serving(served_home, environment={"SLMOPS_SERVE__ALLOWED_ORIGINS": '["http://localhost:3000"]'}) as running:
        yield running


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium, one for all tests; what it opens takes the place of the page before."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("Chromium and its driver are not installed: make apt")
    with chromium(tmp_path_factory.mktemp("chromium")) as open_page:
        yield open_page
