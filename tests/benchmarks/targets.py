"""Measure the costs of slmops, and compare each figure with its target and, if available, with llama.cpp's.

Run as `python -m tests.benchmarks.targets [--json FILE] [--only ROW ...] [--tiny] [--without-peer] [--with-stock]`. The
model is Qwen2.5-0.5B's shape with random weights; `--tiny` takes one of 0.1 M parameters, to try the benchmark itself:
its figures say nothing. All of it takes about fifteen minutes, 6 GB of memory and 20 GB of disk, on a machine that does
nothing else, and the first time ten minutes more, in which llama.cpp is built (tests/benchmarks/llama_cpp.py).

The rows, by the names that `--only` takes:

- build: wall of all variants in one process, its start included, beside llama.cpp's convert + Q8_0 + Q4_0 of the same
  checkpoint, and beside Olive's own path: the time that was recorded once on two cores, or with `--with-stock` run now.
- build-memory: peak resident memory of each build.
- bytes: what builds fetch from the disk, write, and lay down for a time (tests/benchmarks/watching.py says how it is
  counted); Linux only.
- build-3b: peak memory of int4 of a sharded model of 3 B parameters; not where slmops' estimate says it has no room.
- serving: int4's throughput, load time and memory at 128 + 64 tokens on 2 threads, beside Q4_0 in llama-bench.
- startup: `slmops --help` and `slmops list`.
- embedded, server: what a deploy takes beyond its stages (wall of the command, less the time in which any task ran, by
  Prefect's record), and the same deploy again; without a Prefect server and against one.
- many: memory and wall of ten deploys from one process.
- transfer: push to and pull from S3 beside `rclone copy`.
- clients: eight clients of a served int4 of SmolLM2-135M beside one; eight with the same long system prompt.
- deploy-smollm2, deploy-0.5b, deploy-3b: a whole first deploy at three precisions on 50 rows, beside its plan, and the
  memory of all its processes. The last one takes hours, and is measured only by its name.

A row that this machine cannot measure says why. With `--resume`, rows that the file of `--json` has are not measured
again.

After each, the share of the CPUs is told that went to other processes of the machine meanwhile, where it is large: the
figures are then worse than they would be, and threads that wait for one another (llama.cpp's) suffer most.

A missed target is told and is no failure: the exit status is 0. 1 means that a row could not be measured.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from slmops.infra.genai.measurement import cpu_model
from tests.benchmarks import rows_build, rows_deploy, rows_network, rows_orchestration, rows_serving
from tests.benchmarks.bench import ROOT, Bench, NotMeasured, Row
from tests.benchmarks.llama_cpp import LlamaCpp, peer

ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "build": rows_build.build_wall,
    "build-memory": rows_build.build_memory,
    "serving": rows_serving.serving,
    "bytes": rows_build.build_bytes,
    "build-3b": rows_build.build_3b,
    "startup": rows_orchestration.start_up,
    "embedded": rows_orchestration.embedded,
    "server": rows_orchestration.with_server,
    "many": rows_orchestration.many,
    "transfer": rows_network.transfer,
    "clients": rows_network.clients,
    "deploy-smollm2": rows_deploy.deploy_smollm2,
    "deploy-0.5b": rows_deploy.deploy_05b,
    "deploy-3b": rows_deploy.deploy_3b,
}
ONLY_BY_NAME = ("deploy-3b",)
WITH_PEER = ("build", "build-memory", "serving")
MUCH_OF_OTHERS = 0.05
SHORTEST_SHARE_S = 0.5  # the system counts CPU time in ticks of 0.01 s
PACKAGES = ("olive-ai", "onnxruntime", "onnxruntime-genai", "prefect", "torch", "transformers", "foundry-local-sdk")


class Screen:
    """The table as it grows, in a terminal; elsewhere a line a row, and the table at the end."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.rows: list[Row] = []
        self._doing = Spinner("dots")
        self._live = Live(console=self.console, auto_refresh=self.console.is_terminal)

    def __enter__(self) -> "Screen":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.update(table_of(self.rows))
            self._live.stop()
        else:
            self.console.width = 200
            self.console.print(table_of(self.rows))

    def say(self, what: str) -> None:
        """Print the current activity."""
        text = f"{datetime.now():%H:%M:%S} {what}"
        if self.console.is_terminal:
            self._doing.update(text=text)
            self._live.update(Group(table_of(self.rows), self._doing))
        else:
            print(text, flush=True)

    def add(self, row: Row) -> None:
        """Show a row that is finished."""
        self.rows.append(row)
        if not self.console.is_terminal:
            print("  " + " | ".join(cells_of(row)), flush=True)


def table_of(rows: list[Row]) -> Table:
    """Return the table of the rows."""
    table = Table()
    for heading in ("what", "measured", "peer", "ratio", "target", "met"):
        table.add_column(heading, justify="right" if heading in ("measured", "ratio") else "left")
    for row in rows:
        table.add_row(*cells_of(row))
    return table


def cells_of(row: Row) -> list[str]:
    """Return a row's cells, as text."""
    peer_text = "" if row.peer is None else f"{_number(row.peer)} {row.unit} ({row.peer_name})"
    if row.peer is None and row.peer_name:
        peer_text = f"- ({row.peer_name})"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    met = {True: "yes", False: "NO", None: ""}[row.met]
    return [row.what, f"{_number(row.measured)} {row.unit}", peer_text, ratio, row.target, met]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """Return the machine facts on which the figures depend."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "load_average_at_start": psutil.getloadavg(),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # an unpacked source without its history
        return None
    return found.stdout.strip()


class OthersShare:
    """The share of all CPUs, from 0 to 1, that went to processes which are not this one's since this was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._busy_s, self._own_s = _busy_s(), _own_s()

    def now(self) -> float:
        """Return it; children that still run count as others'."""
        all_s = (time.perf_counter() - self._started) * (os.cpu_count() or 1)
        others_s = _busy_s() - self._busy_s - (_own_s() - self._own_s)
        return min(max(0.0, others_s / all_s), 1.0) if all_s > SHORTEST_SHARE_S else 0.0


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "irq", 0) + getattr(times, "softirq", 0) + times.nice)


def _own_s() -> float:
    """CPU time of this process and of its children that ended."""
    times = psutil.Process().cpu_times()
    return float(sum(times[:4]))


def measure(bench: Bench, keys: list[str], screen: Screen, document: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure the rows in turn; a failure does not affect the others. The time of each goes into the document."""
    seconds, others, errors = (document.setdefault(name, {}) for name in ("seconds", "others_cpu_share", "errors"))
    for key in keys:
        started, share = time.perf_counter(), OthersShare()
        try:
            for row in ROWS[key](bench):
                screen.add(row)
                save()
        except NotMeasured as reason:
            document.setdefault("not_measured", {})[key] = str(reason)
            screen.console.print(f"{key} was not measured: {reason}", markup=False)
        except Exception as error:
            errors[key] = f"{type(error).__name__}: {error}"
            screen.console.print(f"{key} could not be measured:\n{traceback.format_exc()}", markup=False)
        seconds[key] = round(time.perf_counter() - started, 1)
        others[key] = round(share.now(), 3)
        if others[key] > MUCH_OF_OTHERS:
            screen.console.print(f"{key}: {others[key]:.0%} of the CPUs went to other processes meanwhile.")
        save()


def main() -> int:
    """Print the table; 0 when every row could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures to this file, after each row")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--resume", action="store_true", help="measure what the file of --json lacks")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries the benchmark itself")
    parser.add_argument("--without-peer", action="store_true", help="build and run no llama.cpp")
    parser.add_argument(
        "--with-stock", action="store_true", help="run Olive's own path too: 4 minutes, 11 GB of memory"
    )
    parser.add_argument("--work", type=Path, help="where to work; by default the system's folder for temporary files")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.json:
        parser.error("--resume needs --json")
    known = json.loads(arguments.json.read_text("utf-8")) if arguments.resume and arguments.json.is_file() else {}
    measured = set(known.get("seconds", ())) - set(known.get("errors", ()))
    keys = [key for key in ROWS if key in (arguments.only or {*ROWS} - {*ONLY_BY_NAME}) and key not in measured]
    facts = machine()
    print(f"{facts['date']}; {facts['cpu']}, {facts['cores']} cores; {facts['versions']}", flush=True)
    llama: LlamaCpp | None = None
    if not arguments.without_peer and set(keys) & set(WITH_PEER):
        llama = peer()
    document: dict[str, Any] = {**known, **facts, "tiny": arguments.tiny, "peer": llama.version if llama else None}
    document["errors"] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="slmops-targets-") as name, Screen() as screen:

        def save() -> None:
            if arguments.json:
                rows = [row for row in known.get("rows", ()) if row["key"] in measured]
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                document["rows"] = [*rows, *(asdict(row) for row in screen.rows)]
                arguments.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")

        bench = Bench(Path(name), tiny=arguments.tiny, peer=llama, say=screen.say, with_stock=arguments.with_stock)
        measure(bench, keys, screen, document, save)
    return 1 if document["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
