"""Prefect's API for one command, where no server is configured.

Prefect's own temporary server outlives a command that is killed. This one is a child process that always ends with its
parent: its standard input is a lifeline, as in `slmops.infra.process.child`.
"""

import atexit
import contextlib
import gc
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from slmops.deployments.server import listening
from slmops.deployments.server.access import OTHERS_MAY_NOTHING, closed_to_others, new_password
from slmops.deployments.server.embedded_database import make_database
from slmops.deployments.server.sqlite_cursors import mend_server_on_sqlite
from slmops.infra.errors import StageFailed
from slmops.infra.process.channel import Channel, child_environment, listen, speak

if TYPE_CHECKING:
    import uvicorn

LOOPBACK = "127.0.0.1"
# The first start with a version of Prefect migrates the database.
STARTUP_TIMEOUT_S = 300
SHUTDOWN_TIMEOUT_S = 10
POLL_INTERVAL_S = 0.05

SERVER_ENVIRONMENT = {
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
}


class EmbeddedServer:
    """Prefect's API server as a child process, which serves until this process ends.

    Its imports take seconds. They start at once and run in parallel with those of the command. Nothing is written
    before `serve`. The server stays for the client's last logs and events, which are sent while the interpreter exits.
    It accepts only calls with `password`, which is a user and password of its own.
    """

    def __init__(self) -> None:
        self.password = new_password()
        self._channel = Channel(
            "slmops.deployments.server.embedded",
            log_path=None,
            work_dir=Path(__file__).parent,  # Prefect takes settings from files of its current directory
            umask=OTHERS_MAY_NOTHING,
            environment=child_environment(SERVER_ENVIRONMENT | closed_to_others(self.password)),
        )
        atexit.register(self.end)

    def serve(self, log_path: Path, templates: Path) -> str:
        """Let it serve on a free port of the loopback interface, with its log in a file, and return its URL.

        `templates` is the folder of `embedded_database.make_database`. Raises `StageFailed` when it does not start.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.touch()
        self._channel.send({"log": str(log_path.absolute()), "templates": str(templates.absolute())})
        return _wait_until_healthy(self._channel, log_path)

    def end(self) -> None:
        """End it, at once if it does not serve yet. Without this call it ends with this process."""
        atexit.unregister(self.end)
        self._channel.end(SHUTDOWN_TIMEOUT_S)


def _wait_until_healthy(channel: Channel, log_path: Path) -> str:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    direct = build_opener(ProxyHandler({}))
    ready = None
    with contextlib.suppress(TimeoutError):
        ready = channel.receive(STARTUP_TIMEOUT_S)
    while ready and channel.status is None and time.monotonic() < deadline:
        url = f"http://{LOOPBACK}:{ready['port']}/api"
        try:
            with direct.open(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return url
        except (URLError, OSError):
            time.sleep(POLL_INTERVAL_S)
    raise StageFailed("Prefect's embedded API server did not start.", f"See its log: {log_path}")


# The child's side


class _Lifeline:
    """Standard input: its only line, `{"log": PATH, "templates": PATH}`, lets the server begin; its end ends it."""

    def __init__(self) -> None:
        self.server: uvicorn.Server | None = None
        self._messages = listen(self._end)  # which may be called at once

    def _end(self) -> None:
        if self.server is None:
            os._exit(0)
        self.server.should_exit = True
        time.sleep(SHUTDOWN_TIMEOUT_S / 2)
        os._exit(1)

    def begin(self) -> Path:
        """Wait for the line, redirect standard output and error to the log, and return the folder of templates."""
        beginning = next(self._messages)
        log = os.open(beginning["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        return Path(beginning["templates"])


def main() -> None:
    """Serve as soon as standard input names a log, until it closes."""
    send = speak()
    lifeline = _Lifeline()
    gc.disable()  # objects of the imports stay alive: garbage collection would add a tenth to their time
    try:
        import uvicorn
        from prefect.server.api.server import create_app
        from prefect.settings import get_current_settings

        gc.freeze()  # Prefect collects garbage at the end of this call
        app = create_app(ephemeral=True, final=True)
        mend_server_on_sqlite()
    finally:
        templates = lifeline.begin()  # a failed import is reported in the log too
    gc.freeze()
    gc.enable()
    prefect = get_current_settings()
    database = prefect.home / "prefect.db"
    connection_url = prefect.server.database.connection_url
    if connection_url and connection_url.get_secret_value() == f"sqlite+aiosqlite:///{database}":
        make_database(database, templates)
    listener = listening.listen(LOOPBACK, 0)
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=2))
    lifeline.server = server
    send({"port": port})
    server.run(sockets=[listener])
    gc.freeze()  # the command waits for this exit, at which the interpreter would scan all loaded objects


if __name__ == "__main__":
    main()
