"""Rows about serving int4 variants: speed, load time and memory, compared with llama.cpp's Q4_0."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmops.infra.genai.calls import Measure
from slmops.infra.process.supervisor import run_in_child
from tests.benchmarks.bench import DEADLINE_S, NEW_TOKENS, PROMPT_TOKENS, THREADS, Bench, Row, row_below, row_beside
from tests.benchmarks.llama_cpp import BenchResult

ROUNDS = 2  # in turns: what else the machine does falls on both
REPETITIONS = 5
PEER = "llama.cpp Q4_0"
RECIPES = ("int4", "int4-fast")


def serving(bench: Bench) -> Iterator[Row]:
    """Prompt and generation throughput, load time and peak memory at 128 + 64 tokens: the default int4, and int4-fast.

    The recipes and the peer take turns.
    """
    ours: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in RECIPES}
    theirs: list[BenchResult] = []
    files = bench.peer_files
    folders = {"int4": bench.builds[0]["int4"].folder, "int4-fast": bench.fast_build.folder}
    for number in range(ROUNDS):
        for recipe, folder in folders.items():
            bench.say(f"serving {recipe}, round {number + 1} of {ROUNDS}")
            ours[recipe].append(_measure(bench, folder, f"{recipe}-{number}"))
        if bench.peer and files:
            bench.say(f"llama-bench, round {number + 1} of {ROUNDS}")
            gguf = files.files["Q4_0"]
            sizes = {"prompt": PROMPT_TOKENS, "new": NEW_TOKENS, "threads": THREADS, "rounds": REPETITIONS}
            theirs.append(bench.peer.bench(gguf, **sizes))
    for recipe in RECIPES:
        yield from _rows_of(recipe, ours[recipe], theirs)


def _rows_of(recipe: str, ours: list[dict[str, Any]], theirs: list[BenchResult]) -> Iterator[Row]:
    for key, title, name, share in (
        ("prompt_processing_throughput_tps", "prompt", "prompt_tps", 0.9),
        ("token_generation_throughput_tps", "generation", "generation_tps", 0.95),
    ):
        measured = [row[key] for run in ours for row in run["rows"]]
        yield row_beside(
            "serving",
            f"{recipe} {title}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {THREADS} threads",
            statistics.median(measured),
            "tok/s",
            peer=statistics.median(getattr(peer, name) for peer in theirs) if theirs else None,
            peer_name=PEER,
            at_least=share,
            all=measured,
            peer_rounds=[getattr(peer, name) for peer in theirs],
        )
    yield Row(
        key="serving",
        what=f"{recipe} load",
        measured=statistics.median(run["load_ms"] for run in ours),
        unit="ms",
        target="",
        met=None,
        details={
            "counts": "model and tokenizer, in a process that has imported onnxruntime-genai",
            "peer_ms_with_process_start_and_one_token": [1000 * peer.start_s for peer in theirs],
        },
    )
    size_bytes = ours[0]["size_bytes"]
    yield row_below(
        "serving",
        f"{recipe} peak RSS when serving",
        max(run["peak_rss_bytes"] for run in ours) / 1e6,
        "MB",
        1.5 * size_bytes / 1e6 + 100,
        f"at most 1.5 x {size_bytes / 1e6:,.1f} MB + 100 MB",
        peer_peak_rss_bytes=max((peer.peak_rss_bytes for peer in theirs), default=None),
    )


def _measure(bench: Bench, folder: Path, name: str) -> dict[str, Any]:
    """Measure as a deploy does, without the sweep over prompt lengths, which these figures do not include."""
    child = run_in_child(
        Measure(
            model_dir=folder,
            prompt_tokens=[PROMPT_TOKENS],
            new_tokens=NEW_TOKENS,
            warmup=1,
            repetitions=REPETITIONS,
            threads=THREADS,
            sweep=None,
        ),
        deadline_s=DEADLINE_S,
        log_path=bench.folder / f"measure-{name}.log",
        work_dir=bench.folder / "measure",
    )
    return child.value.model_dump(mode="json")
