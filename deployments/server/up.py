"""What `slmops up` runs: a Prefect server if none is set, the deployments, and a worker, until it is stopped."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from slmops.deployments.cli.listening import listen
from slmops.deployments.cli.output import print_line, print_note
from slmops.deployments.cli.up import DEFAULT_POOL
from slmops.deployments.server.automations import register_automations
from slmops.deployments.server.environment import QUIET, announced_server, prefect_home
from slmops.deployments.server.registration import ensure_pool, read_deployments, register_deployments, variant_entries
from slmops.deployments.server.supervised import Supervised
from slmops.deployments.server.up_check import server_fault
from slmops.infra.errors import StageFailed
from slmops.infra.process.supervisor import SHADOWING
from slmops.infra.settings import Settings

LOOPBACK = "127.0.0.1"
# The first start migrates a new database.
STARTUP_TIMEOUT_S = 300
POLL_INTERVAL_S = 0.5

# Prefect's server and worker as this command starts them.
SERVER_ENVIRONMENT = {
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    # In memory, as is the default, a restart would leave each held limit held for ever.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}
WORKER_ENVIRONMENT = {
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "10",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
}


def run_up(settings: Settings, pool: str, port: int, limit: int | None) -> None:
    """Start all of it and look after it; `port` is the server's, `limit` is of runs at once, None for the default."""
    stopping = threading.Event()
    with _stopped_by_signals(stopping), contextlib.ExitStack() as started:
        children: list[Supervised] = []
        url = os.environ.get("PREFECT_API_URL")
        if not url:
            url = _start_server(settings, port, children, started, stopping)
        print_line(f"API: {url}")
        _wait_until_healthy(url, children, stopping)
        if stopping.is_set():
            return
        _register(settings, pool)
        # A worker takes all that it finds: without a limit, the first of several machines would take every variant of
        # a deploy. In the default pool deploys wait for their variants, and would hold the places that these need.
        at_once = limit or (None if pool == DEFAULT_POOL else settings.worker.builds)
        worker = Supervised(
            "The worker",
            [
                *("worker", "start", "--pool", pool, "--type", "process", "--name", _worker_name(settings)),
                *(("--limit", str(at_once)) if at_once else ()),
                # Whoever names a port wants to be told there whether the worker lives, such as docker-compose.yml.
                *(("--with-healthcheck",) if os.environ.get("PREFECT_WORKER_WEBSERVER_PORT") else ()),
            ],
            _environment(**WORKER_ENVIRONMENT, PREFECT_API_URL=url),
            settings.cache_dir / "logs" / "prefect-worker.log",
        )
        worker.start()
        children.append(worker)
        started.callback(worker.stop)
        print_line(f"UI: {url.removesuffix('/api')}")
        print_line(f"A worker takes runs from the work pool {pool!r}; its log: {worker.log_path}")
        print_line("Stop with Ctrl-C; slmops up --check says what is running.")
        while not stopping.wait(POLL_INTERVAL_S):
            for child in children:
                if told := child.look_after():
                    print_note(told)
        print_note("Stopping the worker, its runs and what was started beside it.")


@contextlib.contextmanager
def _stopped_by_signals(stopping: threading.Event) -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    former = {number: signal.signal(number, lambda *_: stopping.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _start_server(
    settings: Settings,
    port: int,
    children: list[Supervised],
    started: contextlib.ExitStack,
    stopping: threading.Event,
) -> str:
    with listen(LOOPBACK, port) as free:  # refuses a port that is taken before anything is written
        port = free.getsockname()[1]
    home = prefect_home(settings)
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://{LOOPBACK}:{port}/api"
    server = Supervised(
        "Prefect's server",
        ["server", "start", "--host", LOOPBACK, "--port", str(port)],
        _environment(**SERVER_ENVIRONMENT, PREFECT_UI_API_URL=url),
        settings.cache_dir / "logs" / "prefect-server.log",
    )
    server.start()
    children.append(server)
    started.callback(server.stop)
    _wait_until_healthy(url, children, stopping)
    started.enter_context(announced_server(settings, url))
    os.environ["PREFECT_API_URL"] = url
    return url


def _environment(**extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in SHADOWING}
    # A worker starts its flow runs without -P: the variable tells them.
    return {**inherited, **QUIET, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **extra}


def _wait_until_healthy(url: str, children: list[Supervised], stopping: threading.Event) -> None:
    deadline = time.monotonic() + (STARTUP_TIMEOUT_S if children else 10)
    told_at = time.monotonic()
    while (fault := server_fault(url)) is not None and not stopping.wait(POLL_INTERVAL_S):
        if time.monotonic() > deadline or any(not child.is_running for child in children):
            advice = (
                f"See its log: {children[0].log_path}"
                if children
                else "Start it, or correct PREFECT_API_URL or PREFECT_API_AUTH_STRING."
            )
            raise StageFailed(f"Prefect's API at {url} cannot be used: {fault}.", advice)
        if time.monotonic() - told_at > 2:
            print_note("Waiting for Prefect's server.")
            told_at = time.monotonic() + 8


def _register(settings: Settings, pool: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from slmops.tasks.runs.limits import only_holder

    pools = dict.fromkeys((DEFAULT_POOL, pool))
    variants = [entry for name in pools for entry in variant_entries(name)]
    with temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"]}):
        for name in pools:
            ensure_pool(name)
        # Of machines that start together each would find no automation, and make one.
        with only_holder("slmops-registration"):
            for one in register_deployments([*read_deployments(), *variants]):
                print_line(f"Deployment {one.name}: {one.outcome}.")
            for automation in register_automations(settings):
                print_line(f"Automation {automation!r} is set up.")


def _worker_name(settings: Settings) -> str:
    import hashlib

    home = hashlib.sha256(str(settings.home_dir).encode()).hexdigest()[:6]
    return f"{socket.gethostname()}-{home}"
