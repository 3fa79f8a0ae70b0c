"""Work on stores that is killed, finds its disk full or its clock set: nothing is lost or half visible."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.infra.storage.verification import verify_version
from tests.support import kills
from tests.support.invariants import check_store
from tests.support.kills import STORE_SCENARIOS, KillBench
from tests.support.stores import StoreCase, empty_store
from tests.support.versions import store_version

pytestmark = [pytest.mark.runtime, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
SEED = 20261126
# Of each of the three, 42 in all; tests/benchmarks/reliability.py kills each 50 times.
KILLS = {"file": 6, "rclone": 4, "seaweedfs": 4}


@pytest.fixture
def bench(store: StoreCase, tmp_path: Path) -> KillBench:
    print(f"seed {SEED}")
    return KillBench(store, tmp_path, random.Random(SEED))


@pytest.fixture
def on_disk(tmp_path: Path) -> KillBench:
    print(f"seed {SEED}")
    return KillBench(empty_store(tmp_path / "store", None), tmp_path, random.Random(SEED))


@pytest.mark.parametrize("doing", ["push", "pull", "gc"])
def test_what_is_killed_leaves_nothing_half_done(bench: KillBench, doing: str) -> None:
    STORE_SCENARIOS[doing](bench, KILLS[bench.store.kind])


@pytest.mark.parametrize("doing", ["export", "import"])
def test_an_archive_that_is_killed_under_way_is_whole_or_not_there(on_disk: KillBench, doing: str) -> None:
    STORE_SCENARIOS[doing](on_disk, 4)


def test_a_disk_that_fills_at_any_write_loses_nothing(on_disk: KillBench) -> None:
    kills.disk_filled(on_disk, 6)
    assert on_disk.cut_short


def test_a_clock_that_is_set_loses_nothing(on_disk: KillBench) -> None:
    kills.clock_set(on_disk, len(kills.STEPS))


def test_two_machines_at_once_lose_nothing(on_disk: KillBench) -> None:
    kills.two_machines(on_disk, 4)


COLLECTING = """
import sys, threading
from slmops.infra.errors import PassingFault
from slmops.infra.settings import load_settings
from slmops.infra.storage.garbage import collect_garbage
from slmops.infra.storage.opening import open_registry

team = open_registry(load_settings())
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
rounds = 0
print("ready", flush=True)
while not ended.is_set():
    collect_garbage(team)
    rounds += 1
print(rounds, flush=True)
"""


def test_a_collector_with_a_concurrent_writer_never_removes_what_a_version_needs(bench: KillBench) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLMOPS_HOME": str(bench.folder / "collector home")}
    with subprocess.Popen(
        [sys.executable, "-c", COLLECTING],
        env={**environment, **bench.store.environment()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as collector:
        assert collector.stdin
        assert collector.stdout
        collector.stdout.readline()
        team = bench.team()
        for number in range(9):
            # The content of a version that was just deleted is an orphan that the next one takes up again.
            files = {"weights": b"shared %d" % (number % 2), "graph": b"own %d" % number}
            manifest = store_version(team, bench.folder / f"built-{number}", files)
            assert verify_version(team.of(manifest)).ok
            if number % 3:
                team.mark_deleted(manifest)
        collector.stdin.write("\n")
        collector.stdin.flush()
        assert int(collector.stdout.readline()) > 0
    check_store(team)
    assert len(team.versions("home")) == 3
