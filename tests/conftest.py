"""The environment of all tests: no telemetry, no settings of the user, and no silent skips in CI."""

import dataclasses
import functools
import gc
import os
import shutil
import ssl
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from slmops.infra.process import supervisor
from slmops.infra.process.channel import QUIET_ENVIRONMENT
from slmops.infra.settings import Settings
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.prefect_server import prefect_server
from tests.support.s3_proxy import FaultProxy
from tests.support.s3_servers import S3Server, moto_server, rclone_server, seaweedfs_server
from tests.support.stores import KINDS, StoreCase, empty_store
from tests.support.torch_process import ProcessThatStays

FORBID_SKIPS = "SLMOPS_TESTS_FORBID_SKIPS"
# `all`: also the real tokenizers that take too long for every run (tests/support/family_checkpoints.py).
REAL_TOKENIZERS = "SLMOPS_TESTS_REAL_TOKENIZERS"
# The user's cache: one for all workers of a session, made by the process that starts them, and never the user's own.
USER_CACHE = "SLMOPS_TESTS_USER_CACHE"
# A test that skips because of the operating system says so with this word at the start of its reason.
PLATFORM_REASONS = ("Windows", "POSIX", "process groups are POSIX's")

# Each client of httpx, and Prefect makes several for a run, reads the bundle of authorities anew: 15 ms of CPU time.
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]
gc.disable()  # until all tests are imported (pytest_runtestloop): nothing of them is garbage
# Hundreds of processes import the same modules: each is compiled once, even where the environment forbids to keep that.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Before anything heavy is imported: the libraries read these once.
_PREFECT_HOME = tempfile.mkdtemp(prefix="slmops-tests-prefect-")
_MADE_HERE = [_PREFECT_HOME]
if USER_CACHE not in os.environ:
    os.environ[USER_CACHE] = tempfile.mkdtemp(prefix="slmops-tests-cache-")
    _MADE_HERE.append(os.environ[USER_CACHE])
_KEPT = {FORBID_SKIPS, REAL_TOKENIZERS, USER_CACHE}
for _name in {name for name in os.environ if name.startswith(("SLMOPS_", "PREFECT_"))} - _KEPT:
    del os.environ[_name]
os.environ["SLMOPS_USER_CACHE"] = os.environ[USER_CACHE]
if "PYTEST_XDIST_WORKER" in os.environ:  # two models that compute with all cores' threads slow each other down by far
    # The demo's training, which has two, leaves the core to others where it has nothing to do.
    os.environ |= {"SLMOPS_MACHINE__THREADS": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
QUIET_ENVIRONMENT["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])  # children find the tests' own functions
os.environ.update(QUIET_ENVIRONMENT | {"PREFECT_HOME": _PREFECT_HOME, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"})


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage as the commands do, and leave the tests and their imports out of it."""
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


def pytest_unconfigure() -> None:
    for folder in _MADE_HERE:
        shutil.rmtree(folder, ignore_errors=True)
    gc.freeze()  # at exit the interpreter would scan all objects of the libraries, for seconds


# What a module of tests has at hand when it works with a real runtime, and the fixtures that are real servers.
RUNTIMES = {
    "subprocess",
    "run_in_child",
    "build_genai_model",
    "ChildProcess",
    "TORCH_PROCESS",
    "AutoModelForCausalLM",
    "Popen",
    "family_proof",
    "og",
    "real_model",
}
DEMO = "demo_home"
DEMO_TIMEOUT_S = 1800  # the first of its tests trains and deploys the demo, which takes minutes on a busy machine
# The demo's training has two threads, and the two after it wait more than others.
FIRST = ("demo", "stack", "up")
SERVERS = {"server", "rclone", "moto", "strict", "seaweedfs", "torch_stays"}


@pytest.hookimpl(wrapper=True)  # before `-m` selects and xdist groups, which read the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Mark whole journeys and the tests of real runtimes, and assign groups of tests to workers.

    Those of a module do (`pytest --dist loadgroup`), which share its fixtures, and those of the demo. Whole
    journeys share nothing that takes time to make, unless they say so by the mark itself. What takes longest comes
    first, so that the short tests fill the end evenly: what FIRST names, the groups of journeys, the other journeys.
    """
    for item in items:
        is_journey = item.path.parent.name == "e2e"
        fixtures = set(getattr(item, "fixturenames", ()))
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if is_journey:
            item.add_marker(pytest.mark.journey)
        elif (
            fixtures & {*SERVERS, DEMO}
            or parameters.get("store", "file") != "file"
            or RUNTIMES & set(vars(getattr(item, "module", None) or object))
        ):
            item.add_marker(pytest.mark.runtime)
        if DEMO in fixtures:
            item.add_marker(pytest.mark.xdist_group("demo"))
            item.add_marker(pytest.mark.timeout(DEMO_TIMEOUT_S))
        elif not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid if is_journey else str(item.path)))
    items.sort(key=_place)
    yield


def _place(item: pytest.Item) -> int:
    marker = item.get_closest_marker("xdist_group")
    group = marker.args[0] if marker else ""
    if group in FIRST:
        return FIRST.index(group)
    if item.get_closest_marker("journey"):
        return len(FIRST) + (group == item.nodeid)
    return len(FIRST) + (2 if item.get_closest_marker("runtime") else 3)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make a skipped test a failed one where skips are forbidden."""
    report = yield
    if not hasattr(report, "wasxfail"):
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Make a skipped module a failed one where skips are forbidden."""
    report = yield
    _forbid_skip(report)
    return report


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or os.environ.get(FORBID_SKIPS) != "1":
        return
    reason = (
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
    )
    if not reason.startswith(PLATFORM_REASONS):
        report.outcome = "failed"
        report.longrepr = f"{FORBID_SKIPS} is set, and this was skipped: {reason}"


def unmeasured_environment() -> dict[str, str]:
    """The process environment without coverage in child processes, which mostly run other packages'
    imports, which take half as long again under it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


@pytest.fixture(scope="session")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory whose cache keeps the demo checkpoint, so that all tests together train it once."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight Qwen2 checkpoint of 0.1 M parameters; read only: copy it before changing anything."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny_checkpoint") / "checkpoint")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server on loopback; yields its API's URL."""
    with prefect_server(tmp_path_factory.mktemp("prefect"), unmeasured_environment()) as url:
        yield url
        from prefect.logging.handlers import APILogHandler

        APILogHandler().flush()  # while it answers: at its end the process would try for more than a minute


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """rclone's S3 server over a folder."""
    with rclone_server(tmp_path_factory.mktemp("rclone") / "buckets") as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """moto's S3 server, in memory."""
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def strict(rclone: S3Server) -> Iterator[S3Server]:
    """rclone's server behind a proxy that judges conditions and checksums, as AWS does, unlike these servers."""
    with FaultProxy(rclone, conditional_writes=True, verifies_sha256=True) as proxy:
        yield dataclasses.replace(rclone.at(proxy.endpoint_url), kind="strict")


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server of docker-compose.yml; it verifies checksums and knows conditional writes."""
    with seaweedfs_server(tmp_path_factory.mktemp("seaweedfs") / "data") as server:
        yield server


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StoreCase:
    """An empty store of each kind: a test that asks for it runs on all of them."""
    return empty_store(tmp_path / "store", None if request.param == "file" else request.getfixturevalue(request.param))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory of slmops that does not exist yet, named by SLMOPS_HOME."""
    home = tmp_path / "slmops-home"
    monkeypatch.setenv("SLMOPS_HOME", str(home))
    return home


@pytest.fixture
def settings(home: Path) -> Settings:
    """The default settings, in a home of their own."""
    return Settings(home=home)


@pytest.fixture
def torch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls of torch and of genai performed in processes that stay (tests.support.torch_process)."""
    monkeypatch.setattr(supervisor, "ChildProcess", ProcessThatStays)


@pytest.fixture
def environment() -> Iterator[None]:
    """Put the process environment back after a test of code that sets it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
