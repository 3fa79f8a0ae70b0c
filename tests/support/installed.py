"""slmops as pip installs it: a wheel of the working tree in a virtual environment of its own."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("deployments", "flows", "infra", "tasks")


@dataclass(frozen=True)
class Installed:
    """A virtual environment with slmops."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self._program("python")

    @property
    def slmops(self) -> Path:
        """The command."""
        return self._program("slmops")

    def uninstall(self, name: str) -> None:
        """Uninstall a distribution."""
        pip("--python", self.python, "uninstall", "--yes", name)

    def _program(self, name: str) -> Path:
        folder = self.folder / ("Scripts" if sys.platform == "win32" else "bin")
        return folder / (f"{name}.exe" if sys.platform == "win32" else name)

    def install(self, *arguments: str | Path) -> None:
        """Install something beside the dependencies, by pip and without network.

        Among them may be a slmops, the editable one of the tests: it counts as none.
        """
        options = ("--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation")
        pip("--python", self.python, "install", *options, *arguments)


def pip(*arguments: str | Path) -> None:
    """Run pip, which must succeed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(folder: Path) -> Path:
    """Build the wheel of the working tree in a folder, from a copy: a build leaves files where it happens."""
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(wheel: Path, folder: Path) -> Installed:
    """Make a virtual environment in a folder and install the wheel; its dependencies are those of this process."""
    venv.create(folder, symlinks=sys.platform != "win32")
    made = Installed(folder)
    # A path in a .pth file is searched, and .pth files there are not read: not that of the editable install of slmops.
    found = find_spec("prefect")
    assert found and found.origin
    dependencies = dict.fromkeys([sysconfig.get_path("purelib"), str(Path(found.origin).parents[1])])
    places = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", places))
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n", "utf-8")
    made.install(wheel)
    return made


def environment_of(variables: Mapping[str, str]) -> dict[str, str]:
    """What a user's shell has: these variables, without what this process tells its own children."""
    return {name: value for name, value in variables.items() if not name.startswith("PYTHON")}
