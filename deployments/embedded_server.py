"""Prefect's API for one command, where no server is configured.

Prefect's own temporary server outlives a command that is killed. This one is a child process that ends with its
parent, however that comes about: its standard input is a lifeline, as in `infra.process.child`.
"""

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from deployments.embedded_database import make_database
from infra.errors import StageFailed
from infra.process.supervisor import child_environment

LOOPBACK = "127.0.0.1"
# Where the database is not made ready (another version of Prefect), the first start migrates it.
STARTUP_TIMEOUT_S = 300
SHUTDOWN_TIMEOUT_S = 10
POLL_INTERVAL_S = 0.05

SERVER_ENVIRONMENT = {
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
}


def start_embedded_api(log_path: Path) -> str:
    """Start Prefect's API server on a free port of the loopback interface and return its URL.

    It serves until this process ends: Prefect's client sends its last logs and events while the interpreter exits.
    Raises `StageFailed` when it does not come up.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.embedded_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=child_environment(SERVER_ENVIRONMENT),
            start_new_session=os.name == "posix",  # Ctrl-C is the command's to handle; the server ends after it
        )
    atexit.register(_end, process)
    return _wait_until_healthy(process, log_path)


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin
    process.stdin.close()
    try:
        process.wait(SHUTDOWN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_healthy(process: "subprocess.Popen[bytes]", log_path: Path) -> str:
    assert process.stdout
    port = process.stdout.readline().decode().strip()
    url = f"http://{LOOPBACK}:{port}/api"
    direct = build_opener(ProxyHandler({}))
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with direct.open(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return url
        except (URLError, OSError):
            time.sleep(POLL_INTERVAL_S)
    raise StageFailed("Prefect's embedded API server did not start.", f"See its log: {log_path}")


def main() -> None:
    """Serve until standard input closes."""
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    prefect = get_current_settings()
    database = prefect.home / "prefect.db"
    connection_url = prefect.server.database.connection_url
    if connection_url and connection_url.get_secret_value() == f"sqlite+aiosqlite:///{database}":
        make_database(database)
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    port = listener.getsockname()[1]
    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=2))

    def end_with_the_command() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True
        time.sleep(SHUTDOWN_TIMEOUT_S / 2)
        os._exit(1)

    threading.Thread(target=end_with_the_command, daemon=True).start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
