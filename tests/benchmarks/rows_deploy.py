"""Rows about whole deploys: their wall time beside their plan, and the most memory of all processes together."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from tests.benchmarks.bench import ROOT, Bench, NotMeasured, Row, command_environment, row_below
from tests.benchmarks.random_checkpoint import SHAPES, write_random_checkpoint
from tests.benchmarks.watching import run_watched
from tests.support.packages import RealModelMissing
from tests.support.real_models import real_model

QUESTIONS = Path(__file__).parent / "deploy_questions.jsonl"  # 50 rows
# Weights at random pass no gate, and no recipe is closer to them than the next.
OPEN_GATE = {
    "SLMOPS_GATE__MIN_TOP1_AGREEMENT": "0",
    "SLMOPS_GATE__MAX_KL_DIVERGENCE": "1000",
    "SLMOPS_GATE__MAX_QUALITY_LOSS": "1",
    "SLMOPS_GATE__MAX_CLIFF_RATIO": "1000",
    "SLMOPS_GATE__MAX_MEMORY_GROWTH_BYTES_PER_REQUEST": "1000000000",
}
PLAN_TOLERANCE = 0.25
GB = 1e9


def deploy_smollm2(bench: Bench) -> Iterator[Row]:
    """A first deploy of the real SmolLM2-135M, and one with `int4-rtn`, on 50 rows."""
    try:
        checkpoint = bench.checkpoint if bench.tiny else real_model("smollm2")
    except RealModelMissing as error:
        raise NotMeasured(str(error)) from error
    yield from _deploy(bench, "deploy-smollm2", "SmolLM2-135M", checkpoint, limit_s=200.0)
    yield from _deploy(
        bench, "deploy-smollm2", "SmolLM2-135M, int4-rtn", checkpoint, "--recipe", "int4-rtn", limit_s=150.0
    )


def deploy_05b(bench: Bench) -> Iterator[Row]:
    """A first deploy of the reference model on 50 rows."""
    yield from _deploy(bench, "deploy-0.5b", "0.5 B", bench.checkpoint, limit_s=480.0, most_gb=2.5, settings=OPEN_GATE)


def deploy_3b(bench: Bench) -> Iterator[Row]:
    """A first deploy of a sharded 3 B shape, which takes hours."""
    name, shard_bytes = ("tiny", 100_000) if bench.tiny else ("qwen2.5-3b", 2_000_000_000)
    if not bench.tiny and psutil.virtual_memory().available < 8 * GB:
        raise NotMeasured("it needs 8 GB of free memory")
    checkpoint = write_random_checkpoint(bench.folder / "deployed-3b", SHAPES[name], shard_bytes=shard_bytes)
    yield from _deploy(bench, "deploy-3b", "3 B", checkpoint, most_gb=7.0, settings=OPEN_GATE)


def _deploy(
    bench: Bench,
    key: str,
    what: str,
    checkpoint: Path,
    *options: str,
    limit_s: float | None = None,
    most_gb: float | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Plan and run a first deploy; yields the wall time, the plan beside it, and the peak memory."""
    home = bench.folder / f"{key}-home{len(options)}"
    asked = [str(checkpoint), "--name", "bench", "--eval", str(QUESTIONS), *options, "--json"]
    command = [sys.executable, "-m", "slmops", "deploy", *asked]
    environment = command_environment(SLMOPS_HOME=str(home), **(settings or {}))
    bench.say(f"planning a deploy, {what}")
    plan = subprocess.run(
        [*command, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    planned_s = float(json.loads(plan.stdout)["time_s"])
    bench.say(f"deploying {what}")
    log = bench.folder / f"{home.name}.log"
    done = run_watched(command, log=log, cwd=ROOT, environment=environment, descendants=True, statuses=(0, 3))
    report = json.loads(done.output)
    verdicts = {variant["precision"]: variant["status"] for variant in report["variants"]}
    yield Row(
        key=key,
        what=f"first deploy, {what}, wall",
        measured=done.seconds,
        unit="s",
        target=f"at most {limit_s:g} s" if limit_s else "",
        met=done.seconds <= limit_s if limit_s else None,
        ratio=done.seconds / limit_s if limit_s else None,
        details={"variants": verdicts},
    )
    yield planned_row(key, what, planned_s, done.seconds)
    if most_gb:
        yield row_below(key, f"peak memory of a deploy, {what}, all processes", done.peak_rss_bytes / GB, "GB", most_gb)


def planned_row(key: str, what: str, planned_s: float, took_s: float) -> Row:
    """Return the plan of a deploy beside the time that it took."""
    ratio = planned_s / took_s
    return Row(
        key=key,
        what=f"plan of a deploy, {what}",
        measured=planned_s,
        unit="s",
        target=f"within {PLAN_TOLERANCE:.0%}",
        met=abs(ratio - 1) <= PLAN_TOLERANCE,
        peer=took_s,
        peer_name="the deploy",
        ratio=ratio,
    )
