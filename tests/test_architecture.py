"""docs/architecture.md names existing files, and its example of a new check works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.counts import ROOMS, ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text("utf-8")
MOST_LINES = 80


def test_the_files_that_it_names_exist() -> None:
    prose = re.sub(r"^```diff\n.*?^```$", "", TEXT, flags=re.M | re.S)
    named = re.findall(r"`((?:deployments|flows|tasks|infra|tests)/[^`*]*)`", prose)
    assert len(named) > 40
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_check_of_the_example_is_small_and_works(tmp_path: Path) -> None:
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", TEXT, re.M | re.S)
    assert len(re.findall(r"^\+(?!\+\+)", diff, re.M)) <= MOST_LINES
    tree, package = tmp_path / "tree", tmp_path / "package" / "slmops"
    for folder in (*ROOMS, "tests", "docs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    subprocess.run(["git", "apply"], input=diff, cwd=tree, text=True, check=True)
    shutil.copytree(tree / "deployments" / "slmops", package)
    for room in ROOMS:
        shutil.copytree(tree / room, package / room)
    (test,) = re.findall(r"^\+\+\+ b/(tests/\S+)", diff, re.M)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (package.parent, tree)))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
