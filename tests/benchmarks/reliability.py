"""Kill, fill, set back and restart what slmops uses, and check after each that nothing is lost or half done.

Run as `python -m tests.benchmarks.reliability [--kills 50] [--journeys 50] [--deploys 50] [--requests 10000]
[--json FILE] [--only ROW ...]` on Linux or macOS. Every process is real; the models have 0.1 M random weights.
`--kills` is the number of each cheap row (push, pull, gc, export, import, disk, clock, machines), `--journeys` that of
promote, rollback and serve, which take seconds each, `--deploys` that of deploy, which takes half a minute. Times of
kills are uniform over the undisturbed duration, from a seed that is printed. With `--json`, rows that the file has
already stay, so that a run may be made in parts.

After each, one check (tests/support/invariants.py): every visible version is whole, every alias points to one, nothing
that was complete is missing; the alias, Foundry Local and the running servers agree or the next command says how to put
it right (which is then done); no process goes on. The first violation ends the run with its assertion and status 1.

The short form is in tests/infra/storage/test_store_kills.py and tests/e2e/test_promotion.py.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tests.benchmarks.rows_reliability import Row

SEED = 20261130
PACKAGES = ("onnxruntime-genai", "foundry-local-sdk", "prefect", "olive-ai", "torch")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    packages = {package: version(package) for package in PACKAGES}
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory": memory,
        "python": platform.python_version(),
        **packages,
    }


def table_of(rows: "list[Row]") -> Table:
    """The figures as a table."""
    table = Table("what", "times", "in mid-work", "outcome", "s")
    for row in rows:
        table.add_row(
            row.what,
            f"{row.times:,}",
            f"{row.cut_short:,}" if row.cut_short else "-",
            row.outcome,
            f"{row.seconds:.0f}",
        )
    return table


def write_json(file: Path, seed: int, rows: "list[Row]") -> None:
    """Write the rows, beside those of other keys that the file has."""
    before = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []
    kept = [row for row in before if row["key"] not in {row.key for row in rows}]
    told = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "seed": seed}
    file.write_text(json.dumps({**told, "rows": [*kept, *map(asdict, rows)]}, indent=2), "utf-8")


def main() -> int:
    """Run the rows, print them, and return the exit status."""
    # Here, because each process that is killed imports this module first.
    from tests.benchmarks.rows_reliability import ROWS, Journeys

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each cheap row")
    parser.add_argument("--journeys", type=int, default=50, help="SIGKILLs of promote, of rollback and of serve")
    parser.add_argument("--deploys", type=int, default=50, help="SIGKILLs of deploy")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    console, rows = Console(width=180, highlight=False), []
    console.print(f"{machine()}, seed {asked.seed}")
    with tempfile.TemporaryDirectory(prefix="slmops-reliability-") as folder:
        counts = (asked.kills, asked.journeys, asked.deploys, asked.requests)
        journeys = Journeys(Path(folder), *counts, random.Random(asked.seed))
        with journeys.stack:
            for key in asked.only or ROWS:
                rows.append(ROWS[key](journeys))
                if asked.json:
                    write_json(asked.json, asked.seed, rows)
                console.print(f"{rows[-1].what}: {rows[-1].times}, {rows[-1].outcome}, {rows[-1].seconds:.0f} s")
    console.print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
