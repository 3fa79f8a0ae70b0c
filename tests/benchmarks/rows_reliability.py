"""The rows of tests/benchmarks/reliability.py: what is killed, filled, set or restarted, and what must hold then."""

import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import psutil

from slmops.infra.olive.calls import Build
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CHAMPION
from tests.benchmarks.serving import Load
from tests.e2e.conftest import OPEN_GATE, ROOT, SMALL, Slmops
from tests.e2e.up_process import Up
from tests.support import kills
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.invariants import check_machine, check_no_orphan, check_store
from tests.support.kills import KillBench, small_disk
from tests.support.prefect_server import free_port, prefect_server
from tests.support.served_models import RunningServer, serving
from tests.support.stores import empty_store

INT8 = ("--precision", "int8")  # the quickest build
FOLLOWS = {"SLMOPS_SERVE__FOLLOW_S": "0.5"}
DEADLINE_S = 600

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """What was done `times` times; `cut_short` of them took effect before the work had ended."""

    key: str
    what: str
    times: int
    cut_short: int
    outcome: str
    seconds: float


@dataclass
class Journeys:
    """A machine with two deployed versions of `home`, its Prefect server, and what kills its commands."""

    folder: Path
    kills: int
    journeys: int
    deploys: int
    requests: int
    chance: random.Random
    stack: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def api_url(self) -> str:
        """A Prefect server for all commands."""
        home = self.folder / "prefect"
        home.mkdir()
        return self.stack.enter_context(prefect_server(home, os.environ))

    @cached_property
    def checkpoint(self) -> Path:
        """A checkpoint of 0.1 M random weights."""
        return make_tiny_checkpoint(self.folder / "checkpoint", "qwen2", tied=False, max_position_embeddings=512)

    def machine(self, name: str, **variables: str) -> Slmops:
        """The command line with an empty home."""
        environment = {**OPEN_GATE, **SMALL, "PREFECT_API_URL": self.api_url, "OMP_NUM_THREADS": "1"}
        return Slmops(self.folder / name, {**environment, **variables})

    @cached_property
    def deployed(self) -> Slmops:
        """The machine with home@1, the champion, and home@2."""
        slmops = self.machine("deployed")
        for number in (1, 2):
            self.deploy(slmops, "home", number)
        return slmops

    def deploy(self, slmops: Slmops, name: str, number: int) -> None:
        """Deploy the checkpoint as a version that no other number gives."""
        report = slmops.json(*self.deploying(name, number))
        assert (report["version"], report["status"]) == (number, "registered"), report

    def deploying(self, name: str, number: int) -> tuple[str | Path, ...]:
        """The words of that command."""
        return ("deploy", self.checkpoint, "--name", name, *INT8, "--model-config", f"top_p=0.{50 + number}")

    def kill(self, slmops: Slmops, arguments: tuple[str | Path, ...], after_s: float) -> bool:
        """Run a command and kill its process, and no child of it, after a time; returns whether it was at work."""
        with running(slmops, arguments) as process:
            try:
                process.wait(after_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return True
        assert process.returncode == 0, (arguments, process.returncode)
        return False


@contextmanager
def running(slmops: Slmops, arguments: tuple[str | Path, ...], **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A command at work; its output is in a log beside its home."""
    with slmops.home.with_name(f"{slmops.home.name}.log").open("ab") as log:
        process = subprocess.Popen(
            slmops.command(*arguments), cwd=ROOT, env=slmops.variables(**variables), stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def timed(work: Callable[[], object]) -> float:
    """Return how long it takes, in s."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


# Rows of the store


def on_the_store(what: str, outcome: str, scenario: Callable[[KillBench, int], None]) -> Callable[[Journeys], Row]:
    """Return a row of a scenario of tests.support.kills, on a folder's store."""

    def row(journeys: Journeys) -> Row:
        folder = journeys.folder / scenario.__name__
        folder.mkdir()
        bench = KillBench(empty_store(folder / "store", None), folder, journeys.chance)
        seconds = timed(lambda: scenario(bench, journeys.kills))
        return Row(scenario.__name__, what, bench.tried, bench.cut_short, outcome, seconds)

    return row


def disk(journeys: Journeys) -> Row:
    """Pushes to disks that become full: real ones of a random size, or else writes that find no room."""
    try:
        with small_disk(journeys.folder / "a disk", 1 << 20):
            scenario, what = kills.small_disk_filled, "a push to a disk that is too small by a random number of bytes"
    except OSError:  # not root, or not Linux
        scenario, what = kills.disk_filled, "a disk full at a random write of a push"
    return on_the_store(what, "one sentence, gc works, nothing lost; completed once there was room", scenario)(journeys)


# Rows of whole commands


def deploy(journeys: Journeys) -> Row:
    """SIGKILLs of deploys; each is then run again, which must register what it was to register."""
    slmops, cut_short, began = journeys.machine("killed-deploys"), 0, time.monotonic()
    duration = timed(lambda: journeys.deploy(slmops, "undisturbed", 1))
    for number in range(journeys.deploys):
        name = f"home-{number}"
        cut_short += journeys.kill(slmops, journeys.deploying(name, 1), journeys.chance.uniform(0, duration))
        check_no_orphan(journeys.folder / "killed-deploys")
        check_machine(slmops.home)
        report = slmops.json(*journeys.deploying(name, 1))
        assert (report["version"], report["status"]) in ((1, "registered"), (1, "unchanged")), report
        check_machine(slmops.home)
    outcome = "nothing half visible; the same deploy completed afterwards"
    return Row("deploy", "SIGKILL of `slmops deploy`", journeys.deploys, cut_short, outcome, time.monotonic() - began)


def change_of_champion(journeys: Journeys, command: str) -> Row:
    """SIGKILLs of promotions or rollbacks beside a running server; what the next command names puts it right."""
    slmops, cut_short, told, began = journeys.deployed, 0, 0, time.monotonic()
    with serving(slmops.home, "home", environment={**slmops.environment, **FOLLOWS}) as server:
        slmops.run("promote", "home@1")
        duration = timed(lambda: slmops.run("promote", "home@2"))
        for _ in range(journeys.journeys):
            to = 3 - (champion_of(slmops) or 0)
            words = ("promote", f"home@{to}") if command == "promote" else ("rollback", "home", "--to", str(to))
            after_s = journeys.chance.uniform(0.3 * duration, duration)  # before, Python imports
            cut_short += journeys.kill(slmops, words, after_s)
            check_no_orphan(slmops.home, [server.process.pid])
            if check_machine(slmops.home):
                told += 1
                shown = slmops.run("list").stderr
                assert f"Put it right with slmops promote home@{champion_of(slmops)}" in " ".join(shown.split()), shown
                slmops.run("promote", f"home@{champion_of(slmops)}")
                assert check_machine(slmops.home) == []
    outcome = f"agreed at once {journeys.journeys - told} times, by the command that the next one names {told} times"
    what = f"SIGKILL of `slmops {command}`, a server running"
    return Row(command, what, journeys.journeys, cut_short, outcome, time.monotonic() - began)


def champion_of(slmops: Slmops) -> int | None:
    """The alias in the store."""
    return open_registry(Settings(home=slmops.home)).alias("home", CHAMPION)


def serve(journeys: Journeys) -> Row:
    """SIGKILLs of servers, also during their start; the next one serves."""
    slmops, cut_short, began = journeys.deployed, 0, time.monotonic()

    def start_and_ask() -> None:
        with serving(slmops.home, "home", environment=slmops.environment) as server:
            ask(server, 1)

    duration = timed(start_and_ask)
    for _ in range(journeys.journeys):
        cut_short += journeys.kill(slmops, ("serve", "home", "--port", "0"), journeys.chance.uniform(0, duration))
        check_no_orphan(slmops.home)
        check_machine(slmops.home)
    start_and_ask()
    check_no_orphan(slmops.home)
    outcome = "no runtime went on; the next server served"
    return Row("serve", "SIGKILL of `slmops serve`", journeys.journeys, cut_short, outcome, time.monotonic() - began)


def ask(server: RunningServer, requests: int) -> list[str]:
    """Send requests from four clients; returns the errors."""
    load = Load(server, requests, 1)
    load.run(4)
    return load.errors


def requests(journeys: Journeys) -> Row:
    """Requests without pause while the champion changes."""
    slmops, promotions, began = journeys.deployed, 0, time.monotonic()
    with serving(slmops.home, "home", environment=slmops.environment) as server:
        load = Load(server, journeys.requests, 1)
        asking = threading.Thread(target=load.run, args=(4,))
        asking.start()
        while asking.is_alive():
            assert slmops.json("promote", f"home@{3 - (champion_of(slmops) or 0)}")["servers"] == 1
            promotions += 1
        assert load.errors == []
        assert len(load.latencies_ms) == journeys.requests
    check_machine(slmops.home)
    outcome = f"no error; {promotions} promotions meanwhile"
    return Row("requests", "requests of 4 clients", journeys.requests, 0, outcome, time.monotonic() - began)


def server_restart(journeys: Journeys) -> Row:
    """A Prefect server is killed during a deploy's build, and started again."""
    began, home, port = time.monotonic(), journeys.folder / "restarted", free_port()
    home.mkdir()
    slmops = journeys.machine("through-a-restart", PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
    with ExitStack() as stack:
        with prefect_server(home, os.environ, port):
            words = journeys.deploying("home", 1)
            process = stack.enter_context(running(slmops, words))
            log = slmops.home.with_name("through-a-restart.log")
            wait_until(lambda: "build int8" in log.read_text("utf-8", "replace"), process)
        with prefect_server(home, os.environ, port):
            status = process.wait(DEADLINE_S)
            check_no_orphan(slmops.home)
            check_machine(slmops.home)
            report = slmops.json(*words)
            assert report["version"] == 1, report
    outcome = f"the deploy ended with status {status}; the same deploy again: {report['status']}"
    return Row("server", "SIGKILL of Prefect's server in mid-run", 1, 1, outcome, time.monotonic() - began)


def worker_death(journeys: Journeys) -> Row:
    """One of two workers is killed while it builds; the other one builds it."""
    began = time.monotonic()
    shared = {"SLMOPS_STORE__URI": (journeys.folder / "team").as_uri(), "SLMOPS_WORKER__LOST_AFTER_S": "60"}
    workers = [Up(journeys.folder / name, journeys.machine(name, **shared).variables()) for name in ("left", "right")]
    slmops = journeys.machine("client", **shared, SLMOPS_WORKER__POOL="builders")
    try:
        for worker in workers:
            worker.start("--pool", "builders")
            worker.wait_until_ready()
        shipped = slmops.run("ingest", journeys.checkpoint).stdout.split()[-1]
        with running(slmops, ("deploy", shipped, "--name", "home", *INT8)) as process:
            builder = wait_until(lambda: builder_of(workers), process)
            killed = next(worker for worker in workers if builder in worker.tree)
            killed.kill()
            assert process.wait(DEADLINE_S) == 0
        check_no_orphan(killed.home)
        check_store(open_registry(Settings(home=slmops.home, store={"uri": shared["SLMOPS_STORE__URI"]})), ["home@1"])
    finally:
        for worker in workers:
            worker.end()
    outcome = "declared crashed, built by the other worker, registered"
    return Row("worker", "SIGKILL of a worker during its build", 1, 1, outcome, time.monotonic() - began)


def wait_until(reached: Callable[[], T | None], command: "subprocess.Popen[bytes]") -> T:
    """Return what is reached, once it is, while a command is at work."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := reached()):
        assert command.poll() is None, command.args
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def builder_of(workers: list[Up]) -> psutil.Process | None:
    """A process of a worker that builds."""
    for process in (process for worker in workers for process in worker.tree):
        with suppress(psutil.Error):
            if Build.target() in process.cmdline():
                return process
    return None


ROWS: dict[str, Callable[[Journeys], Row]] = {
    "push": on_the_store("SIGKILL of a push", "the next push completed", kills.push_killed),
    "pull": on_the_store("SIGKILL of a pull", "the next pull completed, gc removed the rest", kills.pull_killed),
    "gc": on_the_store("SIGKILL of a collection", "the next one removed the rest", kills.gc_killed),
    "export": on_the_store("SIGKILL of an export", "a whole archive or none", kills.export_killed),
    "import": on_the_store("SIGKILL of an import", "the next import completed", kills.import_killed),
    "disk": disk,
    "clock": on_the_store("a clock set by 5 s to 30 years during a push and a gc", "nothing lost", kills.clock_set),
    "machines": on_the_store(
        "pushes, promotions of the alias and gc of two machines at once", "every version there", kills.two_machines
    ),
    "deploy": deploy,
    "promote": lambda journeys: change_of_champion(journeys, "promote"),
    "rollback": lambda journeys: change_of_champion(journeys, "rollback"),
    "serve": serve,
    "requests": requests,
    "server": server_restart,
    "worker": worker_death,
}
