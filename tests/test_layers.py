"""What `make lint` cannot say of imports: the package by its own name only, cheap to import, without side effect."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("infra", "tasks", "flows", "deployments")
HEAVY = {"torch", "transformers", "olive", "prefect", "onnxruntime", "onnxruntime_genai", "foundry_local_sdk", "boto3"}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""


@pytest.mark.parametrize("room", ROOMS)
def test_modules_are_imported_by_their_full_names(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for module in imports_of(path):
            top = module.partition(".")[0]
            assert top not in (*ROOMS, "tests"), f"{path.relative_to(ROOT)} imports {module}, which is slmops.{module}"


def modules_of_infra() -> list[str]:
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "infra").rglob("*.py"))
    # Olive finds its passes by importing their module, which must derive from Olive's class.
    left_out = ("__init__", "model_builder", "quantizing_passes")
    return [".".join(("slmops", *path.parts)) for path in paths if path.name not in left_out]


def test_importing_infra_and_the_command_line_is_cheap_and_has_no_side_effect(tmp_path: Path) -> None:
    program = (
        "import sys, importlib\n"
        f"for name in {[*modules_of_infra(), 'slmops.deployments.cli.app']!r}: importlib.import_module(name)\n"
        f"print(sorted(set(sys.modules) & {HEAVY!r}))"
    )
    environment = {"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "most", "left_out"),
    [
        ("--help", 300, {*HEAVY, "httpx", "yaml", "pydantic", "asyncio"}),
        ("list", 520, {*HEAVY, "httpx", "yaml"}),
    ],
)
def test_a_command_that_only_prints_imports_little(tmp_path: Path, command: str, most: int, left_out: set[str]) -> None:
    program = f"""
import sys
from slmops.deployments.cli.app import run
assert run([{command!r}]) == 0
print(len(sys.modules), sorted(set(sys.modules) & {left_out!r}))
"""
    environment = {"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    count, _, found = done.stdout.splitlines()[-1].partition(" ")
    assert found == "[]"
    assert int(count) < most


def test_a_training_script_that_deploys_its_checkpoint_needs_no_other_package(tmp_path: Path) -> None:
    # As `pip install --no-deps slmops` leaves it: its own modules and the standard library.
    shutil.copytree(ROOT / "deployments" / "slmops", tmp_path / "slmops")
    shutil.copytree(ROOT / "infra", tmp_path / "slmops" / "infra")
    program = """
from slmops.client import start_deploy
from slmops.events import checkpoint_ready
from slmops.infra.errors import StageFailed
for ask in (start_deploy, checkpoint_ready):
    try:
        ask("s3://models/helpdesk-7", "helpdesk")
    except StageFailed as error:
        print(error.code)
"""
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-S", "-c", program]  # -S: without installed packages
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["no-server-answers"] * 2


def test_no_grammar_is_built_whenever_prefect_is_imported() -> None:
    # jsonschema, which Prefect imports, takes up rfc3987-syntax where that is installed, and that one builds its
    # grammar anew at every import: seconds for each command, if only a dependency of the tests brings it.
    program = "import sys, jsonschema; assert 'rfc3987_syntax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_top_level_is_the_agreed_one() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    allowed = {
        *ROOMS,
        "tests",
        "docs",
        ".ci",
        ".github",
        "pyproject.toml",
        "docker-compose.yml",
        "README.md",
        "LICENSE",
    }
    allowed |= {"Makefile", "constraints.txt", ".gitignore"}
    assert {name.split("/")[0] for name in listed} <= allowed
