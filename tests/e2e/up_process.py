"""`slmops up` as a user's service manager runs it."""

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.e2e.conftest import ROOT

READY = "slmops up --check says what is running"
START_DEADLINE_S = 240  # a hang, not a slow machine, fails here


class Up:
    """One `slmops up` with a home directory of its own, started in `folder`."""

    def __init__(self, home: Path, environment: dict[str, str], folder: Path = ROOT) -> None:
        self.home = home
        self.folder = folder
        self.environment = {**environment, "SLMOPS_HOME": str(home)}
        self.log = home.with_name(f"{home.name}.log")

    def start(self, *arguments: str) -> None:
        """Start it; `wait_until_ready` waits for it."""
        command = [sys.executable, "-P", "-m", "slmops", "up", *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        """Wait until the worker was started."""
        deadline = time.monotonic() + START_DEADLINE_S
        while READY not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    @property
    def api_url(self) -> str:
        """The API's address, as it was printed."""
        found = re.search(r"^API: (\S+)$", self.log.read_text(), re.MULTILINE)
        assert found
        return found[1]

    @property
    def password(self) -> str:
        """The API's user and password, from the file that the message names."""
        found = re.search(r"asks for the user and password in (\S+);", self.log.read_text())
        assert found
        return Path(found[1]).read_text().strip()

    @property
    def client(self) -> dict[str, str]:
        """The environment of a client elsewhere, as the documentation says."""
        return {"PREFECT_API_URL": self.api_url, "PREFECT_API_AUTH_STRING": self.password}

    @property
    def tree(self) -> list[psutil.Process]:
        """It and all that it started."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []

    def kill(self) -> None:
        """End it like a power failure."""
        for process in self.tree:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait()

    def end(self) -> None:
        """Stop it after a test."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
