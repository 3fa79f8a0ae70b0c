"""A Prefect server on loopback, for tests and benchmarks."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from filelock import FileLock

from slmops.infra.settings import Settings

START_DEADLINE_S = 120
# Loops over the database, of which the tests' runs need none; `slmops up`, which has them, has tests of its own.
IDLE_LOOPS = ("FOREMAN", "LATE_RUNS", "PAUSE_EXPIRATIONS", "REPOSSESSOR", "CLEANUP_RECONCILER")


@contextmanager
def prefect_server(home: Path, environment: Mapping[str, str], port: int | None = None) -> Iterator[str]:
    """Run a server whose files lie in `home`, a folder that is there; yields its API's URL.

    With the `port` of one that has ended, it goes on with what that one left in `home`.
    """
    _make_database(home / "prefect.db")
    port = port or free_port()
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    # The page asks the API at this address; its default is port 4200.
    interface = {"PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api"}
    loops = {f"PREFECT_SERVER_SERVICES_{loop}_ENABLED": "false" for loop in IDLE_LOOPS}
    variables = {**environment, **quiet, **interface, **loops, "PREFECT_HOME": str(home)}
    variables.pop("PREFECT_API_URL", None)
    prefect = "slmops.deployments.server.sqlite_cursors"  # Prefect's own comes to a standstill on a busy machine
    command = [sys.executable, "-m", prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}/api"
    try:
        _wait_until_healthy(url, home / "log")
        yield url
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _make_database(path: Path) -> None:
    """As embedded servers have theirs: migrated once for all tests, in a process that may import Prefect's server."""
    program = (
        "import sys; from pathlib import Path; from slmops.deployments.server.embedded_database import make_database\n"
        "path, templates = map(Path, sys.argv[1:])\n"
        "assert make_database(path, templates) or path.exists()"
    )
    templates = Settings().user_cache_dir
    templates.mkdir(parents=True, exist_ok=True)
    with FileLock(templates / "lock"):
        subprocess.run([sys.executable, "-c", program, str(path), str(templates)], check=True)


def _wait_until_healthy(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
