"""Rows about the overhead around the stages: start, deploy, second deploy, many deploys."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from tests.benchmarks.bench import ROOT, Bench, Row, command_environment, row_below
from tests.benchmarks.watching import run_watched
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.prefect_server import prefect_server
from tests.support.versions import store_version

# Weights at random pass no gate, and what is measured is not the stages but what is around them.
SHORT_STAGES = {
    "SLMOPS_GATE__MIN_TOP1_AGREEMENT": "0",
    "SLMOPS_GATE__MAX_KL_DIVERGENCE": "1000",
    "SLMOPS_GATE__MAX_QUALITY_LOSS": "1",
    "SLMOPS_GATE__MAX_CLIFF_RATIO": "1000",
    "SLMOPS_GATE__MAX_MEMORY_GROWTH_BYTES_PER_REQUEST": "1000000000",
    "SLMOPS_EVALUATION__MAX_ROWS": "4",
    "SLMOPS_EVALUATION__MAX_NEW_TOKENS": "12",
    "SLMOPS_BENCHMARK__REPETITIONS": "2",
    "SLMOPS_BENCHMARK__NEW_TOKENS": "8",
}
START_TRIES = 5
MANY = 10
RECORD_DEADLINE_S = 30
# A growth that goes on is told from caches that fill by the deploys after the third.
SETTLED_AFTER = 3
MOST_GROWTH_SHARE = 0.05

Interval = tuple[datetime, datetime]


def start_up(bench: Bench) -> Iterator[Row]:
    """The command line's own start: best of several cold processes."""
    home = bench.folder / "ten-versions"
    registry = ModelRegistry(LocalObjectStore(home / "store"))
    for number in range(10):
        store_version(registry, bench.folder / "versions" / str(number), name=f"model-{number}")
    for arguments, what in ((("--help",), "slmops --help"), (("list",), "slmops list, ten models")):
        bench.say(what)
        walls = [_command(bench, home, arguments)[0] for _ in range(START_TRIES)]
        yield row_below("startup", f"{what}, best of {START_TRIES}", min(walls), "s", 0.4, all=walls)


def embedded(bench: Bench) -> Iterator[Row]:
    """A deploy, and the same deploy again, without a configured Prefect server."""
    home = bench.folder / "embedded-home"
    yield from _deploy_twice(bench, "embedded", home, {}, overhead=(4.0, 0.0), again_s=5.0)


def with_server(bench: Bench) -> Iterator[Row]:
    """The same against a running server."""
    folder = bench.folder / "prefect"
    folder.mkdir()
    bench.say("starting a Prefect server")
    with prefect_server(folder, command_environment()) as url:
        home = bench.folder / "server-home"
        yield from _deploy_twice(bench, "server", home, {"PREFECT_API_URL": url}, overhead=(1.5, 0.0), again_s=2.5)


def _deploy_twice(
    bench: Bench,
    key: str,
    home: Path,
    variables: Mapping[str, str],
    *,
    overhead: tuple[float, float],
    again_s: float,
) -> Iterator[Row]:
    checkpoint = make_tiny_checkpoint(bench.folder / f"{key}-checkpoint")
    precisions = ["--precision", "int4"] if bench.tiny else []
    command = ("deploy", str(checkpoint), "--name", "bench", *precisions, "--json")
    bench.say(f"deploying, {key}")
    begun = datetime.now(UTC)
    first_s, _ = _command(bench, home, command, variables)
    runs = _task_runs(home, variables.get("PREFECT_API_URL"), begun)
    stages_s = covered_s([run[1:] for run in runs])
    bench.say(f"deploying again, {key}")  # no run is made, if the machine was idle enough for the first one's figures
    again, output = _command(bench, home, command, variables)
    fixed_s, share = overhead
    limit = fixed_s + share * stages_s
    in_words = f"at most {fixed_s:g} s" + (f" + {share:.0%} of {stages_s:.1f} s" if share else "")
    yield row_below(
        key,
        f"a deploy beyond its stages, {key}",
        first_s - stages_s,
        "s",
        limit,
        in_words,
        wall_s=first_s,
        stages_s=stages_s,
        stages=[(name, (end - start).total_seconds()) for name, start, end in runs],
    )
    yield row_below(
        key,
        f"deploy again, nothing changed, {key}",
        again,
        "s",
        again_s,
        status=json.loads(output)["status"],
    )


def _command(
    bench: Bench, home: Path, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> tuple[float, str]:
    """Run slmops in a fresh process; returns its wall time in s and its standard output."""
    command = [sys.executable, "-m", "slmops", *arguments]
    environment = command_environment(SLMOPS_HOME=str(home), **SHORT_STAGES, **(variables or {}))
    done = run_watched(command, log=bench.folder / f"{home.name}.log", cwd=ROOT, environment=environment)
    return done.seconds, done.output


def _task_runs(home: Path, api_url: str | None, begun: datetime) -> list[tuple[str, datetime, datetime]]:
    """Return name, start and end of each task run since a time, as Prefect recorded them; several may share a name.

    A server records them from events, some time after the run; a run is waited for until none is without an end.
    """
    deadline = time.monotonic() + RECORD_DEADLINE_S
    while True:
        rows = _rows_of_server(api_url) if api_url else _rows_of_database(home / "prefect" / "prefect.db")
        runs = [(name, _time(start), _time(end) if end else None) for name, start, end in rows if start]
        runs = [run for run in runs if run[1] >= begun]
        found = [(name, start, end) for name, start, end in runs if end]
        if (found and len(found) == len(runs)) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def _rows_of_database(path: Path) -> list[tuple[str, str, str]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute("SELECT name, start_time, end_time FROM task_run ORDER BY start_time").fetchall()


def _rows_of_server(url: str) -> list[tuple[str, str, str]]:
    answer = httpx.post(f"{url}/task_runs/filter", json={"sort": "EXPECTED_START_TIME_ASC"}, timeout=30)
    return [(run["name"], run["start_time"], run["end_time"]) for run in answer.raise_for_status().json()]


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def covered_s(intervals: Sequence[Interval]) -> float:
    """Return the s in which at least one of the intervals ran: what overlaps counts once."""
    total = 0.0
    until: datetime | None = None
    for start, end in sorted(intervals):
        begin = start if until is None or start > until else until
        if end > begin:
            total += (end - begin).total_seconds()
            until = end
    return total


def many(bench: Bench) -> Iterator[Row]:
    """Deploys of different tiny checkpoints from one Python process."""
    count = 2 if bench.tiny else MANY
    checkpoints = [make_tiny_checkpoint(bench.folder / f"many-{number}", seed=number) for number in range(count)]
    home = bench.folder / "many-home"
    environment = command_environment(SLMOPS_HOME=str(home), **SHORT_STAGES)
    command = [sys.executable, "-m", "tests.benchmarks.many_deploys", *map(str, checkpoints)]
    log = bench.folder / "many.log"
    lines: list[dict[str, Any]] = []
    started = time.perf_counter()
    begun = datetime.now(UTC)
    with log.open("wb") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout
        try:
            for line in process.stdout:
                with contextlib.suppress(ValueError):  # what a library may print
                    lines.append(json.loads(line))
                    bench.say(f"deployed {len(lines)} of {count} from one process")
        except BaseException:
            process.kill()
            raise
        finally:
            status = process.wait()
    if status:
        raise RuntimeError(f"many_deploys ended with status {status}: {log.read_text('utf-8', 'replace')[-2000:]}")
    wall_s = time.perf_counter() - started
    with closing(sqlite3.connect(f"file:{home / 'prefect' / 'prefect.db'}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT start_time, end_time FROM task_run WHERE end_time IS NOT NULL").fetchall()
    stages_s = sum((_time(end) - _time(start)).total_seconds() for start, end in rows if _time(start) >= begun)
    settled = min(SETTLED_AFTER, count - 1) - 1
    memory = [line["rss_bytes"] for line in lines]
    growth = memory[-1] / memory[settled] - 1
    yield row_below(
        "many",
        f"growth of the parent's RSS from deploy {settled + 1} to {count}",
        100 * growth,
        "%",
        100 * MOST_GROWTH_SHARE,
        f"constant: at most {MOST_GROWTH_SHARE:.0%}",
        rss_bytes=memory,
    )
    yield Row(
        key="many",
        what=f"{count} deploys (int4) from one process, wall",
        measured=wall_s,
        unit="s",
        target="at most the sum of the stages",
        met=wall_s <= stages_s,
        peer=stages_s,
        peer_name="the sum of the stages",
        ratio=wall_s / stages_s,
        details={"wall_s": [line["wall_s"] for line in lines], "states": [line["state"] for line in lines]},
    )
