"""slmops and foreign code: code in the current directory never runs, and the user's own projects still work."""

import json
import os
import re
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.conftest import unmeasured_environment
from tests.e2e.conftest import OPEN_GATE, SMALL
from tests.support.installed import ROOMS, Installed, build_wheel, environment_of, installed
from tests.support.prefect_api import call, query, registering_anew

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("foreign code")]

DEADLINE_S = 240  # a hang, not a slow machine, fails here
STANDARD = ("queue", "asyncio", "json", "socket")
DEPENDENCIES = ("httpx", "prefect", "psutil", "pydantic", "torch", "typer")
TRAPS = (*ROOMS, *STANDARD, *DEPENDENCIES)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def beside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """slmops where users have projects of their own."""
    return installed(wheel, tmp_path_factory.mktemp("beside") / "venv")


def set_traps(folder: Path, marker: Path, names: tuple[str, ...] = TRAPS) -> Path:
    """Fill a folder with packages that leave a line in the marker when they are imported."""
    trap = f"import sys\nwith open({str(marker)!r}, 'a') as told:\n    print(__file__, sys.argv, file=told)\n"
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(trap)
    return folder


def set_traps_for_prefect(folder: Path, marker: Path) -> None:
    """Files that Prefect reads in its current directory: each has its logging run a function when it is set up."""
    (folder / "logging.yml").write_text(
        f"version: 1\nformatters:\n  trap: {{'()': os.system, command: 'echo logging >> {marker}'}}\n"
    )
    (folder / "prefect.toml").write_text(
        '[logging]\nconfig_path = "logging.yml"\n[api]\nurl = "http://127.0.0.1:9/api"\n'
    )
    (folder / "pyproject.toml").write_text('[tool.prefect.logging]\nconfig_path = "logging.yml"\n')
    (folder / ".env").write_text("PREFECT_LOGGING_CONFIG_PATH=logging.yml\nPREFECT_API_URL=http://127.0.0.1:9/api\n")


@dataclass
class Surrounded:
    """The command `slmops`, surrounded by foreign code; `marker` exists after some of that code ran."""

    installed: Installed
    checkpoint: Path
    on_path: Path
    marker: Path
    variables: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        return [str(self.installed.slmops), *arguments]

    def run(self, *arguments: str, text: str = "", **extra: str) -> str:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.checkpoint,
            env={**self.variables, **extra},
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.assert_nothing_ran()
        return done.stdout

    def assert_nothing_ran(self) -> None:
        assert not self.marker.exists(), self.marker.read_text()

    @contextmanager
    def running(self, *arguments: str, until: str, **extra: str) -> Iterator[str]:
        """Run a command until it is left; yields what it printed until it printed a pattern."""
        log = self.marker.with_name(f"{arguments[0]}.log")
        with log.open("w") as stream:
            process = subprocess.Popen(
                self.command(*arguments),
                cwd=self.checkpoint,
                env={**self.variables, **extra},
                stdout=stream,
                stderr=stream,
            )
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not re.search(until, log.read_text()):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield log.read_text()
        finally:
            process.terminate()
            process.wait(60)
        self.assert_nothing_ran()


@pytest.fixture(scope="module")
def surrounded(wheel: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Surrounded:
    folder = tmp_path_factory.mktemp("surrounded")
    marker = folder / "marker"
    checkpoint = shutil.copytree(tiny, folder / "checkpoint")
    set_traps(checkpoint, marker, (*TRAPS, "slmops"))
    set_traps_for_prefect(checkpoint, marker)
    # Without slmops itself: what Python finds before the command begins is beyond it.
    on_path = set_traps(folder / "on path", marker)
    slmops = installed(wheel, folder / "venv")
    for name, packages, options in (
        ("another", ("flows", "tasks"), ()),
        ("editable", ("deployments", "infra"), ("-e",)),
    ):
        write_distribution(set_traps(folder / name, marker, packages), packages)
        slmops.install(*options, folder / name)
    variables = environment_of(unmeasured_environment()) | OPEN_GATE | SMALL
    variables |= {"SLMOPS_HOME": str(folder / "home"), "SLMOPS_SOAK__REQUESTS": "0", "PYTHONPATH": str(on_path)}
    return Surrounded(slmops, checkpoint, on_path, marker, variables)


def write_distribution(folder: Path, packages: Sequence[str]) -> None:
    """Make a folder of packages a distribution that pip can install, named like the folder."""
    (folder / "setup.py").write_text(
        f"import setuptools\nsetuptools.setup(name={folder.name!r}, packages={[*packages]!r})\n"
    )


def test_the_traps_work(surrounded: Surrounded, tmp_path: Path) -> None:
    """Python itself runs the traps in such a folder, so the other tests do not pass for lack of traps."""
    marker = tmp_path / "marker"
    folder = set_traps(tmp_path / "folder", marker)
    subprocess.run(
        [surrounded.installed.python, "-c", "import queue, flows"],
        cwd=folder,
        env=environment_of(os.environ),
        check=True,
    )
    assert len(marker.read_text().splitlines()) == 2


def test_deploy_chat_and_serve_run_no_code_of_the_checkpoint(surrounded: Surrounded) -> None:
    report = json.loads(surrounded.run("deploy", ".", "--name", "home", "--precision", "int4", "--json"))
    assert report["status"] == "registered"
    assert surrounded.run("chat", "home", text="hello\n\n")
    with surrounded.running("serve", "--port", "0", until=r"http://\S+") as said:
        found = re.search(r"http://[\w.:]+", said)
        assert found
        question = {"model": "home", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        answer = httpx.post(f"{found[0]}/v1/chat/completions", json=question, timeout=DEADLINE_S)
        assert answer.raise_for_status().json()["choices"]


def test_up_registers_its_own_flows_and_its_worker_runs_them(surrounded: Surrounded, server: str) -> None:
    up = surrounded.running("up", PREFECT_API_URL=server, until="slmops up --check")
    with registering_anew(server), up:
        made = query(server, "deployments")
        assert {"deploy", "retrain", "benchmark", "promote", "rollback", "gc"} <= {
            deployment["name"] for deployment in made
        }
        assert all(deployment["entrypoint"].startswith("slmops.flows.") for deployment in made)
        (deploy,) = [deployment for deployment in made if deployment["name"] == "deploy"]
        assert "checkpoint" in deploy["parameter_openapi_schema"]["required"]
        parameters = {"checkpoint": str(surrounded.checkpoint), "name": "home", "precisions": ["int4"]}
        url = f"{server}/deployments/{deploy['id']}/create_flow_run"
        run = call("POST", url, {"parameters": parameters})["id"]
        deadline = time.monotonic() + DEADLINE_S
        while (state := call("GET", f"{server}/flow_runs/{run}")["state"])["type"] not in ("COMPLETED", "FAILED"):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert state["type"] == "COMPLETED", state["message"]


def test_as_a_module_too(surrounded: Surrounded) -> None:
    done = subprocess.run(
        [surrounded.installed.python, "-m", "slmops", "list"],
        cwd=surrounded.on_path,
        env=surrounded.variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "home" in done.stdout
    surrounded.assert_nothing_ran()


def test_the_wheel_has_one_package(wheel: Path) -> None:
    """Therefore no other distribution overwrites its files or removes them when it is uninstalled."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"slmops"}


USERS_FLOW = """
from prefect import flow
from tasks.numbers import three

@flow
def deploy():
    return three() + 4
"""
RUN_IT = "from flows.deploy import deploy\nprint('made', deploy())\n"


def write_project(folder: Path, *, packages: bool) -> Path:
    for name, text in (("flows/deploy.py", USERS_FLOW), ("tasks/numbers.py", "def three():\n    return 3\n")):
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for room in ROOMS:
        (folder / room).mkdir(exist_ok=True)
        if packages:
            (folder / room / "__init__.py").touch()
    (folder / "run.py").write_text(RUN_IT)
    return folder


@pytest.mark.parametrize("how", ["plain folders", "packages", "on PYTHONPATH", "another distribution", "editable"])
def test_flows_of_the_users_of_the_same_names_work(how: str, beside: Installed, server: str, tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", packages=how != "plain folders")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "run.py").write_text(RUN_IT)
    variables = environment_of(unmeasured_environment())
    variables |= {"PREFECT_API_URL": server, "SLMOPS_HOME": str(tmp_path / "home")}
    if how == "on PYTHONPATH":
        variables["PYTHONPATH"] = str(project)
    is_distribution = how in ("another distribution", "editable")
    if is_distribution:
        write_distribution(project, ROOMS)
        beside.install(*(["--editable"] if how == "editable" else []), project)

    def run(*command: str | Path) -> str:
        folder = project if how in ("plain folders", "packages") else elsewhere
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        assert run(beside.python, "run.py").strip() == "made 7"
        assert "deploy" in run(beside.slmops, "--help")
        assert json.loads(run(beside.slmops, "list", "--json")) == {"models": []}
    finally:
        if is_distribution:
            beside.uninstall("project")
    assert json.loads(run(beside.slmops, "list", "--json")) == {"models": []}
