"""Stores of real tiny models to be served, and servers on them as a user's shell starts them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.registry import ModelRegistry
from tests.support.versions import add_evidence, store_version

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120


def store_model(
    registry: ModelRegistry, model_dir: Path, folder: Path, name: str = "home", content: str = ""
) -> Manifest:
    """Store a genai folder as a version of `name` that passed the gate; other `content` makes it another version."""
    files = {
        path.relative_to(model_dir).as_posix(): path.read_bytes() for path in model_dir.rglob("*") if path.is_file()
    }
    manifest = store_version(registry, folder, {**files, "NOTICE": content.encode()}, name)
    add_evidence(registry, manifest, "selection", {"selected": "int4"})
    registry.set_alias(name, "champion", manifest.version, "the first", only_if_free=True)
    return manifest


@dataclass
class RunningServer:
    """A server process and its address; what it printed is in `log`."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path
    home: Path

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """OpenAI's own client, which asks once."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def metric(self, line: str) -> float:
        """The value of a metric, such as `slmops_requests_active{model="home:1"}`; 0 where there is none."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def runtimes(self) -> list[int]:
        """Numbers of the processes that hold a model."""
        import psutil

        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # one that ended meanwhile
                if "slmops.infra.foundry.model_process" in child.cmdline():
                    found.append(child.pid)
        return found

    def stop(self) -> int:
        """Ask the server to end, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(home: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[RunningServer]:
    """Start `slmops serve` on a free port and wait until it serves."""
    log = home / "server.log"
    home.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "SLMOPS_HOME": str(home), "SLMOPS_SERVE__FOLLOW_S": "0", **(environment or {})}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "slmops", "serve", "--port", "0", *arguments],
            cwd=ROOT,
            env=variables,
            stdout=stream,
            stderr=stream,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"Serving at (http://\S+)/v1", log.read_text("utf-8"))):
            assert process.poll() is None, log.read_text("utf-8")
            assert time.monotonic() < deadline, log.read_text("utf-8")
            time.sleep(0.05)
        yield RunningServer(process, found[1], log, home)
    finally:
        process.kill()
        process.wait()
