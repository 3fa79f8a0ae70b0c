"""The folders at the top are parts of one package, and pyproject.toml names each of them."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("deployments", "flows", "infra", "tasks")


def test_every_folder_of_the_package_is_named() -> None:
    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"])
    root_package = ROOT / "deployments" / "slmops"
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py")} - {root_package}
    assert named == {"slmops", *(".".join(("slmops", *folder.relative_to(ROOT).parts)) for folder in folders)}
