"""`slmops up`: a Prefect server if none is set, the deployments, and a worker, until it is stopped."""

import contextlib
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from slmops.deployments.server.access import (
    AUTH_FILE,
    OTHERS_MAY_NOTHING,
    closed_to_others,
    make_password,
    make_private,
)
from slmops.deployments.server.automations import HEARTBEAT_S, HEARTBEAT_VARIABLE, register_automations
from slmops.deployments.server.environment import QUIET, announced_server, prefect_home
from slmops.deployments.server.listening import listen
from slmops.deployments.server.registration import read_deployments, register_deployments, variant_entries
from slmops.deployments.server.supervised import Children, Report, Supervised
from slmops.deployments.server.up_check import is_open, server_fault
from slmops.deployments.server.work_pool import DEFAULT_POOL, ensure_pool
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.channel import SHADOWING
from slmops.infra.settings import Settings

LOOPBACK = "127.0.0.1"
# The first start migrates a new database.
STARTUP_TIMEOUT_S = 300
POLL_INTERVAL_S = 0.5

# Prefect's server and worker as this command starts them.
SERVER_ENVIRONMENT = {
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    # With the default, leases in memory, a restart would leave each held limit held forever.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}
WORKER_ENVIRONMENT = {
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "10",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
    HEARTBEAT_VARIABLE: str(HEARTBEAT_S),
}


def run_up(settings: Settings, pool: str, port: int, limit: int | None, *, say: Report, note: Report) -> None:
    """Start everything and supervise it. `port` is the server's; `limit` is the number of concurrent runs, or None.

    `say` prints the result, `note` prints events.
    """
    stopping = threading.Event()
    with _stopped_by_signals(stopping), Children(stopping, note) as children:
        url = os.environ.get("PREFECT_API_URL")
        port = port if url else _free(port)  # refuses one that is taken before anything is written
        make_private(prefect_home(settings))
        children.enter(_only_one(settings, pool))
        if url:
            say(f"API: {url}")
            _wait_until_healthy(url, children, stopping, note)
            if is_open(url):
                note("It requires no password: whoever reaches it can run programs here. See docs/orchestration.md.")
        else:
            url = _start_server(settings, port, children, stopping, say=say, note=note)
        if stopping.is_set():
            return
        _register(settings, pool, say, note)
        worker = _worker(settings, pool, limit)
        children.start(worker)
        say(f"UI: {url.removesuffix('/api')}")
        say(f"A worker takes runs from the work pool {pool!r}; its log: {worker.log_path}")
        say("Stop with Ctrl-C; slmops up --check says what is running.")
        children.look_after()
        note("Stopping the worker, its runs and the server.")


@contextlib.contextmanager
def _stopped_by_signals(stopping: threading.Event) -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    former = {number: signal.signal(number, lambda *_: stopping.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _only_one(settings: Settings, pool: str) -> Iterator[None]:
    """Be this home's only `slmops up` of a work pool; raises `BadInput` if there is one."""
    from filelock import FileLock, Timeout

    lock = FileLock(prefect_home(settings) / f"up-{hashlib.sha256(pool.encode()).hexdigest()[:6]}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BadInput(
            f"Another slmops up of {settings.home_dir} takes runs from the work pool {pool!r} already.",
            "See it with slmops up --check. To start another one, stop it, or name another home or --pool.",
            code="up-already",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _free(port: int) -> int:
    """Return the port, which is free, or a free one for 0."""
    with listen(LOOPBACK, port) as free:
        return int(free.getsockname()[1])


def _start_server(
    settings: Settings, port: int, children: Children, stopping: threading.Event, *, say: Report, note: Report
) -> str:
    home = prefect_home(settings)
    password, where = _password(home)
    url = f"http://{LOOPBACK}:{port}/api"
    os.environ["PREFECT_API_AUTH_STRING"] = password
    server = Supervised(
        "Prefect's server",
        ["server", "start", "--host", LOOPBACK, "--port", str(port)],
        _environment(**SERVER_ENVIRONMENT, **closed_to_others(password)),
        settings.cache_dir / "logs" / "prefect-server.log",
        umask=OTHERS_MAY_NOTHING,
    )
    children.start(server)
    say(f"API: {url}")
    _wait_until_healthy(url, children, stopping, note)
    children.enter(announced_server(settings, url))
    os.environ["PREFECT_API_URL"] = url
    say(f"The UI asks for the user and password {where}; clients give them as PREFECT_API_AUTH_STRING.")
    return url


def _password(home: Path) -> tuple[str, str]:
    """Return the server's user and password, and where they are set: in the environment or in a file."""
    for variable in ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"):
        if password := os.environ.get(variable):
            return password, f"of {variable}"
    return make_password(home), f"in {home / AUTH_FILE}"


def _worker(settings: Settings, pool: str, limit: int | None) -> Supervised:
    # A worker takes all runs that it finds: without a limit, the first of several machines would take every variant of
    # a deploy. In the default pool, deploys wait for their variants and would hold the slots that these need.
    at_once = limit or (None if pool == DEFAULT_POOL else settings.worker.builds)
    return Supervised(
        "The worker",
        [
            *("worker", "start", "--pool", pool, "--type", "process", "--name", _worker_name(settings)),
            *(("--limit", str(at_once)) if at_once else ()),
            # A user who sets a port expects the worker's health check there, as in docker-compose.yml.
            *(("--with-healthcheck",) if os.environ.get("PREFECT_WORKER_WEBSERVER_PORT") else ()),
        ],
        _environment(**WORKER_ENVIRONMENT, PREFECT_API_URL=os.environ["PREFECT_API_URL"]),
        settings.cache_dir / "logs" / "prefect-worker.log",
    )


def _environment(**extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in SHADOWING}
    # A worker starts its flow runs without -P: the variable has the same effect.
    return {**inherited, **QUIET, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **extra}


def _wait_until_healthy(url: str, children: Children, stopping: threading.Event, note: Report) -> None:
    server = children.first
    deadline = time.monotonic() + (STARTUP_TIMEOUT_S if server else 10)
    reported_at = time.monotonic()
    while (fault := server_fault(url)) is not None and not stopping.wait(POLL_INTERVAL_S):
        if time.monotonic() > deadline or (server and not server.is_running):
            advice = (
                f"See its log: {server.log_path}"
                if server
                else "Start it, or correct PREFECT_API_URL or PREFECT_API_AUTH_STRING."
            )
            raise StageFailed(f"Prefect's API at {url} cannot be used: {fault}.", advice)
        if time.monotonic() - reported_at > 2:
            note("Waiting for Prefect's server.")
            reported_at = time.monotonic() + 8


def _register(settings: Settings, pool: str, say: Report, note: Report) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    from slmops.tasks.runs.limits import only_holder

    pools = dict.fromkeys((DEFAULT_POOL, pool))
    variants = [entry for name in pools for entry in variant_entries(name)]
    password = os.environ.get("PREFECT_API_AUTH_STRING")
    with temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: password}):
        for name in pools:
            if message := ensure_pool(name):
                note(message)
        # Machines that start together would each find no automation, and each make one.
        with only_holder("slmops-registration"):
            for deployment in register_deployments([*read_deployments(), *variants]):
                say(f"Deployment {deployment.name}: {deployment.outcome}.")
            for automation in register_automations(settings, _worker_name(settings)):
                say(f"Automation {automation!r} is set up.")


def _worker_name(settings: Settings) -> str:
    home = hashlib.sha256(str(settings.home_dir).encode()).hexdigest()[:6]
    return f"{socket.gethostname()}-{home}"
