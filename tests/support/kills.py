"""Work on a store in processes that are killed at random times, fill their disk, or have their clock set."""

import contextlib
import errno
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

from slmops.infra.errors import SlmopsError
from slmops.infra.settings import load_settings
from slmops.infra.storage import local
from slmops.infra.storage.archive import export_version, import_version
from slmops.infra.storage.copying import copy_version
from slmops.infra.storage.garbage import collect_garbage, needed_blobs
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.infra.storage.s3 import bucket
from tests.support.invariants import check_store
from tests.support.stores import StoreCase
from tests.support.versions import content_of, latest_evidence, store_version

PART_BYTES = 5 << 20  # so that a file of some MB is sent in parts to S3
ARCHIVE = "version.tar"

# A process starts as a copy of one that has done the imports.
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    PROCESSES.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Order:
    """What a process does with `reference` and a folder: `folder` is its own store, or holds archives."""

    doing: str
    reference: str
    folder: Path
    full_after: int | None = None  # writes of a whole file that find room on the disk


def work(order: Order, environment: dict[str, str], parent: Connection) -> None:
    """Say when it is ready, begin when it is told to, and say when it is done: "done", or the error's code."""
    os.environ.update(environment)
    bucket.PART_BYTES = PART_BYTES
    team = open_registry(load_settings())
    list(team.objects.entries("leases"))  # what is opened at the first use is opened now
    parent.send("ready")
    parent.recv()
    with contextlib.ExitStack() as stack:
        if order.full_after is not None:
            stack.enter_context(mock.patch.object(local, "flush_to_disk", _disk_with_room_for(order.full_after)))
        try:
            _do(order, team)
        except SlmopsError as error:
            parent.send(error.code)
        else:
            parent.send("done")


def _do(order: Order, team: ModelRegistry) -> None:
    here = ModelRegistry(LocalObjectStore(order.folder))
    match order.doing:
        case "push":
            copy_version(here.find(order.reference), team)
        case "pull":
            copy_version(team.find(order.reference), here)
        case "gc":
            collect_garbage(team)
        case "export":
            export_version(team, team.find(order.reference).manifest, order.folder / ARCHIVE)
        case "import":
            import_version(order.folder / ARCHIVE, team, order.folder / "work")
        case doing:
            raise AssertionError(doing)


def _disk_with_room_for(writes: int) -> Callable[[object], None]:
    """Return a `flush_to_disk` that finds the disk full after a number of writes."""
    done = 0

    def flush(_: object) -> None:
        nonlocal done
        done += 1
        if done > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return flush


@dataclass
class KillBench:
    """One store, a machine that works with it, and counts of what was tried and what was cut short."""

    store: StoreCase
    folder: Path
    chance: random.Random
    tried: int = 0
    cut_short: int = 0
    took_s: float = 0.0  # the last one, from its first step

    @property
    def here(self) -> ModelRegistry:
        """The machine's own store."""
        return ModelRegistry(LocalObjectStore(self.folder / "here"))

    def team(self) -> ModelRegistry:
        """The store as another process opens it, with nothing cached."""
        return self.store.registry(self.folder / f"home-{self.chance.getrandbits(64):x}")

    def version(self, name: str, registry: ModelRegistry) -> tuple[Manifest, dict[str, bytes]]:
        """Store a version of 7 MB in 8 files."""
        files = {"weights": self.chance.randbytes(PART_BYTES + 2_000_000), "graph": self.chance.randbytes(300_000)}
        files |= {f"small/{number}": self.chance.randbytes(2000) for number in range(6)}
        return store_version(registry, self.folder / "built" / name, files, name), files

    def run(self, order: Order, kill_after_s: float | None = None) -> str | None:
        """Do it in a process of its own, killed after a time; returns what it says at its end, None if killed."""
        environment = {"SLMOPS_HOME": str(self.folder / "killed home"), **self.store.environment()}
        child, parent = PROCESSES.Pipe()
        process = PROCESSES.Process(target=work, args=(order, environment, parent))
        process.start()
        parent.close()
        assert child.recv() == "ready"
        began = time.monotonic()
        child.send("begin")
        process.join(kill_after_s)
        process.kill()
        process.join()
        self.took_s = time.monotonic() - began
        self.tried += 1
        # A process that is killed before it has read "begin" resets the connection.
        with contextlib.suppress(EOFError, ConnectionResetError):
            return str(child.recv())
        assert kill_after_s is not None
        self.cut_short += 1
        return None

    def duration_s(self, order: Order) -> float:
        """How long it takes undisturbed."""
        assert self.run(order) == "done"
        self.tried -= 1
        return self.took_s

    def kill(self, order: Order, within_s: float) -> None:
        """Do it, killed at a random time."""
        self.run(order, self.chance.uniform(0, within_s))


def push_killed(bench: KillBench, times: int) -> None:
    """A killed push leaves no half-visible version, and the next one completes."""
    whole, _ = bench.version("undisturbed", bench.here)
    duration = bench.duration_s(Order("push", whole.reference, bench.folder / "here"))
    names = {whole.reference}
    for number in range(times):
        manifest, _ = bench.version(f"home-{number}", bench.here)
        bench.kill(Order("push", manifest.reference, bench.folder / "here"), duration)
        team = bench.team()
        check_store(team, names, manifest.name)
        assert copy_version(bench.here.of(manifest), team).version.manifest == manifest
        assert latest_evidence(team, manifest, "deploy") == latest_evidence(bench.here, manifest, "deploy")
        names.add(manifest.reference)
    check_store(bench.team(), names)
    check_store(bench.here, names)


def pull_killed(bench: KillBench, times: int) -> None:
    """A killed pull leaves no half-visible version, the next one completes, and gc removes what it left."""
    manifest, files = bench.version("home", bench.team())
    duration = bench.duration_s(Order("pull", "home@1", bench.folder / "undisturbed"))
    for number in range(times):
        folder = bench.folder / f"there-{number}"
        bench.kill(Order("pull", "home@1", folder), duration)
        there = ModelRegistry(LocalObjectStore(folder))
        check_store(there)
        copy_version(bench.team().of(manifest), there)
        assert content_of(there, manifest, bench.folder / f"out-{number}") == files
        collect_garbage(there)
        assert list(there.objects.entries("aside")) == []
        check_store(there, ["home@1"])
    check_store(bench.team(), ["home@1"])


def gc_killed(bench: KillBench, times: int) -> None:
    """A killed collection removes nothing that is needed, and the next one removes all that is not."""
    team = bench.team()
    bench.version("kept", team)
    team.set_alias("kept", CHAMPION, 1, "the first")
    order = Order("gc", "-", bench.folder / "here")

    def litter(number: int) -> None:
        gone, _ = bench.version(f"gone-{number}", team)
        team.mark_deleted(gone)
        for _ in range(10):
            team.objects.put_bytes(f"blobs/sha256/{bench.chance.randbytes(32).hex()}", b"an orphan")

    litter(-1)
    duration = bench.duration_s(order)
    for number in range(times):
        litter(number)
        bench.kill(order, duration)
        check_store(bench.team(), ["kept@1"])
        collect_garbage(bench.team())
        keys = {entry.key for entry in team.objects.entries("blobs/sha256")}
        assert keys == {blob.key for blob in needed_blobs(team)}
    check_store(bench.team(), ["kept@1"])
    assert team.names() == ["kept"]
    assert list(team.objects.entries("leases")) == []


def export_killed(bench: KillBench, times: int) -> None:
    """A killed export leaves a whole archive or none, and the next one to another place completes."""
    manifest, _ = bench.version("home", bench.team())
    undisturbed = bench.folder / "undisturbed"
    undisturbed.mkdir()
    duration = bench.duration_s(Order("export", "home@1", undisturbed))
    whole = (undisturbed / ARCHIVE).read_bytes()
    for number in range(times):
        folder = bench.folder / f"export-{number}"
        folder.mkdir()
        bench.kill(Order("export", "home@1", folder), duration)
        if (folder / ARCHIVE).exists():
            assert (folder / ARCHIVE).read_bytes() == whole
        else:
            export_version(bench.team(), manifest, folder / ARCHIVE)
        assert (folder / ARCHIVE).read_bytes() == whole
        (folder / ARCHIVE).unlink()
    check_store(bench.team(), ["home@1"])


def import_killed(bench: KillBench, times: int) -> None:
    """A killed import leaves no half-visible version, and the next one completes."""
    (bench.folder / "archives").mkdir()
    kept = []
    duration = None
    for number in range(-1, times):
        manifest, _ = bench.version(f"home-{number + 1}", bench.here)
        folder = bench.folder / "archives" / manifest.name
        folder.mkdir()
        export_version(bench.here, manifest, folder / ARCHIVE)
        order = Order("import", manifest.reference, folder)
        kept.append(manifest.reference)
        if duration is None:
            duration = bench.duration_s(order)
            continue
        bench.kill(order, duration)
        check_store(bench.team(), kept[:-1], manifest.name)
        import_version(folder / ARCHIVE, bench.team(), folder / "work")
        check_store(bench.team(), kept, manifest.name)
    check_store(bench.team(), kept)


def disk_filled(bench: KillBench, times: int) -> None:
    """A push to a disk that becomes full at a random write ends with one sentence, and completes once there is room."""
    for number in range(times):
        manifest, _ = bench.version(f"home-{number}", bench.here)
        order = Order("push", manifest.reference, bench.folder / "here", bench.chance.randrange(16))
        said = bench.run(order)
        assert said in ("done", "disk-failed"), said
        bench.cut_short += said != "done"
        check_store(bench.team(), only=manifest.name)
        collect_garbage(bench.team())
        copy_version(bench.here.of(manifest), bench.team())
    check_store(bench.team(), [f"home-{number}@1" for number in range(times)])


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a disk of that size; yields what gives it another size. Raises `OSError` where that is not allowed."""
    folder.mkdir(parents=True)

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode:
            raise OSError(done.returncode, done.stderr.decode(errors="replace"))

    mount(f"size={size_bytes}")
    try:
        yield lambda size_bytes: mount(f"remount,size={size_bytes}")
    finally:
        subprocess.run(["umount", folder], check=True)


def small_disk_filled(bench: KillBench, times: int) -> None:
    """The same on a disk of a random size, for a user who may mount one; gc runs while it is full."""
    for number in range(times):
        manifest, _ = bench.version(f"home-{number}", bench.here)
        root = bench.folder / "disks" / str(number)
        on_disk = KillBench(StoreCase(root.as_uri(), None), bench.folder, bench.chance)
        with small_disk(root, bench.chance.randrange(1 << 16, 9_000_000)) as resize:
            said = on_disk.run(Order("push", manifest.reference, bench.folder / "here"))
            assert said in ("done", "disk-failed"), said
            check_store(on_disk.team())
            assert on_disk.run(Order("gc", "-", bench.folder / "here")) == "done"
            resize(64 << 20)
            copy_version(bench.here.of(manifest), on_disk.team())
            check_store(on_disk.team(), [manifest.reference])
        bench.tried += 1
        bench.cut_short += said != "done"


STEPS = tuple(timedelta(seconds=step) for step in (-1e9, -86400 * 2, -7200, -5, 5, 7200, 86400 * 2, 1e9))


def clock_set(bench: KillBench, times: int) -> None:
    """A clock that is set between a writer's first blob and its commit, while another process collects garbage."""
    root = Path(bench.folder / "store")
    for number in range(times):
        step = STEPS[number % len(STEPS)].total_seconds()
        manifest, _ = bench.version(f"home-{number}", bench.here)
        team = bench.team()
        variant = bench.here.of(manifest).variants[0]
        variant.version.registry.materialize(variant.files, bench.folder / f"out-{number}")
        team.add_files(bench.folder / f"out-{number}")
        for path in root.rglob("*"):  # what was written before has another age by the new clock
            found = path.stat()
            os.utime(path, (found.st_atime - step, found.st_mtime - step))
        assert bench.run(Order("gc", "-", bench.folder / "here")) == "done"
        bench.cut_short += 1
        copy_version(bench.here.of(manifest), team)
        team.release_files()
    check_store(bench.team(), [f"home-{number}@1" for number in range(times)])


def two_machines(bench: KillBench, times: int) -> None:
    """Two machines push versions of one name at once while each collects garbage: each is there, with a number."""
    context = PROCESSES
    processes = []
    for machine in ("left", "right"):
        environment = {"SLMOPS_HOME": str(bench.folder / machine), **bench.store.environment()}
        processes.append(context.Process(target=_push_many, args=(machine, bench.folder / machine, environment, times)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    bench.tried += 2 * times
    team = bench.team()
    found = team.versions("home")
    check_store(team, [f"home@{number + 1}" for number in range(2 * times)])
    contents = [content_of(team, version.manifest, bench.folder / "out" / version.reference) for version in found]
    assert len({content["whose"] for content in contents}) == len(contents) == 2 * times
    assert team.alias("home", CHAMPION) is not None


def _push_many(machine: str, folder: Path, environment: dict[str, str], times: int) -> None:
    os.environ.update(environment)
    here, team = ModelRegistry(LocalObjectStore(folder / "store")), open_registry(load_settings())
    for number in range(times):
        manifest = store_version(here, folder / f"built-{number}", {"whose": f"{machine} {number}".encode()})
        copied = copy_version(here.of(manifest), team, renumber=True).version
        team.set_alias("home", CHAMPION, copied.number, f"{machine} says so")
        collect_garbage(team)


STORE_SCENARIOS: dict[str, Callable[[KillBench, int], None]] = {
    "push": push_killed,
    "pull": pull_killed,
    "gc": gc_killed,
    "export": export_killed,
    "import": import_killed,
}
