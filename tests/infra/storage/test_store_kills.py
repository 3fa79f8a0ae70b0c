"""SIGKILL at random points of push, pull and gc: nothing is lost or half visible, and the next run completes."""

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from slmops.infra.settings import load_settings
from slmops.infra.storage.copying import copy_version
from slmops.infra.storage.garbage import collect_garbage, needed_blobs
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.s3 import bucket
from slmops.infra.storage.verification import verify_version
from tests.support.stores import StoreCase
from tests.support.versions import content_of, latest_evidence, store_version

pytestmark = [pytest.mark.runtime, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
SEED = 20261126
PART_BYTES = 5 << 20  # so that a file of some MB is sent in parts
KILLS = {"file": 4, "rclone": 12, "moto": 2, "seaweedfs": 3}  # of each of the three: 63 in all

# A process starts as a copy of one that has done the imports.
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    PROCESSES.set_forkserver_preload([__name__])


def work(doing: str, reference: str, folder: Path, environment: dict[str, str], parent: Connection) -> None:
    """What is killed: it says when it is ready, begins when it is told to, and says when it is done."""
    os.environ.update(environment)
    bucket.PART_BYTES = PART_BYTES
    here, team = ModelRegistry(LocalObjectStore(folder)), open_registry(load_settings())
    list(team.objects.entries("leases"))  # what is opened at the first use is opened now
    parent.send("ready")
    parent.recv()
    if doing == "push":
        copy_version(here.find(reference), team)
    elif doing == "pull":
        copy_version(team.find(reference), here)
    else:
        collect_garbage(team)
    parent.send("done")


@dataclass
class Bench:
    """One store, the machine that pushes to it, and the process that is killed."""

    store: StoreCase
    folder: Path
    chance: random.Random

    @property
    def here(self) -> ModelRegistry:
        return ModelRegistry(LocalObjectStore(self.folder / "here"))

    def team(self) -> ModelRegistry:
        """The store as another process opens it, with nothing cached."""
        return self.store.registry(self.folder / f"home-{self.chance.getrandbits(64):x}")

    def version(self, name: str, registry: ModelRegistry) -> tuple[Manifest, dict[str, bytes]]:
        files = {"weights": self.chance.randbytes(PART_BYTES + 2_000_000), "graph": self.chance.randbytes(300_000)}
        files |= {f"small/{number}": self.chance.randbytes(2000) for number in range(6)}
        return store_version(registry, self.folder / "built" / name, files, name), files

    def run(self, doing: str, reference: str, folder: Path, kill_after_s: float | None = None) -> float | None:
        """Do it in a process of its own, killed after a time; returns its duration in s, None if it was killed."""
        environment = {"SLMOPS_HOME": str(self.folder / "killed home"), **self.store.environment()}
        child, parent = PROCESSES.Pipe()
        process = PROCESSES.Process(target=work, args=(doing, reference, folder, environment, parent))
        process.start()
        parent.close()
        assert child.recv() == "ready"
        began = time.monotonic()
        child.send("begin")
        process.join(kill_after_s)
        process.kill()
        process.join()
        took = time.monotonic() - began
        # A process that is killed before it has read "begin" resets the connection.
        with contextlib.suppress(EOFError, ConnectionResetError):
            return took if child.recv() == "done" else None
        assert kill_after_s is not None
        return None

    def check(self, registry: ModelRegistry) -> None:
        """Every visible version is whole, and every alias points to one."""
        for name in registry.names():
            versions = registry.versions(name)
            for version in versions:
                found = verify_version(version)
                assert found.ok, found.damage
            assert set(registry.aliases(name).values()) <= {version.number for version in versions}


@pytest.fixture
def bench(store: StoreCase, tmp_path: Path) -> Bench:
    print(f"seed {SEED}")
    return Bench(store, tmp_path, random.Random(SEED))


def test_push(bench: Bench) -> None:
    whole, _ = bench.version("undisturbed", bench.here)
    duration = bench.run("push", whole.reference, bench.folder / "here")
    assert duration
    for number in range(KILLS[bench.store.kind]):
        manifest, _ = bench.version(f"home-{number}", bench.here)
        bench.run("push", manifest.reference, bench.folder / "here", bench.chance.uniform(0, duration))
        team = bench.team()
        for found in team.versions(manifest.name):
            assert verify_version(found).ok
        assert copy_version(bench.here.of(manifest), team).version.manifest == manifest
        assert latest_evidence(team, manifest, "deploy") == latest_evidence(bench.here, manifest, "deploy")
    assert len(bench.team().names()) == KILLS[bench.store.kind] + 1
    bench.check(bench.team())
    bench.check(bench.here)


def test_pull(bench: Bench) -> None:
    team = bench.team()
    manifest, files = bench.version("home", team)
    duration = bench.run("pull", "home@1", bench.folder / "undisturbed")
    assert duration
    for number in range(KILLS[bench.store.kind]):
        folder = bench.folder / f"there-{number}"
        bench.run("pull", "home@1", folder, bench.chance.uniform(0, duration))
        there = ModelRegistry(LocalObjectStore(folder))
        bench.check(there)
        copy_version(bench.team().of(manifest), there)
        assert content_of(there, manifest, bench.folder / f"out-{number}") == files
        collect_garbage(there)
        assert list(there.objects.entries("aside")) == []
    bench.check(bench.team())


def test_gc(bench: Bench) -> None:
    team = bench.team()
    bench.version("kept", team)

    def litter(number: int) -> None:
        gone, _ = bench.version(f"gone-{number}", team)
        team.mark_deleted(gone)
        for _ in range(10):
            team.objects.put_bytes(f"blobs/sha256/{bench.chance.randbytes(32).hex()}", b"an orphan")

    litter(-1)
    duration = bench.run("gc", "-", bench.folder / "here")
    assert duration
    for number in range(KILLS[bench.store.kind]):
        litter(number)
        bench.run("gc", "-", bench.folder / "here", bench.chance.uniform(0, duration))
        bench.check(bench.team())
        collect_garbage(bench.team())
        keys = {entry.key for entry in team.objects.entries("blobs/sha256")}
        assert keys == {blob.key for blob in needed_blobs(team)}
    bench.check(bench.team())
    assert team.names() == ["kept"]
    assert list(team.objects.entries("leases")) == []


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


def test_a_collector_with_a_concurrent_writer_never_removes_what_a_version_needs(bench: Bench) -> None:
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
    bench.check(team)
    assert len(team.versions("home")) == 3
