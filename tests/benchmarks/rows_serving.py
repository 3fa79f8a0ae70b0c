"""Rows about the int4 variant at work: speed, load time and memory, beside llama.cpp's Q4_0."""

import statistics
from collections.abc import Iterator
from typing import Any

from infra.process.supervisor import run_in_child
from tests.benchmarks.bench import DEADLINE_S, NEW_TOKENS, PROMPT_TOKENS, THREADS, Bench, Row, row_below, row_beside
from tests.benchmarks.llama_cpp import BenchResult

ROUNDS = 2  # in turns: what else the machine does falls on both
REPETITIONS = 5
PEER = "llama.cpp Q4_0"


def serving(bench: Bench) -> Iterator[Row]:
    """Prompt and generation throughput, load time and peak memory at 128 + 64 tokens."""
    ours: list[dict[str, Any]] = []
    theirs: list[BenchResult] = []
    folder, files = bench.builds[0]["int4"].folder, bench.peer_files
    for number in range(ROUNDS):
        bench.say(f"serving int4, round {number + 1} of {ROUNDS}")
        ours.append(_measure(bench, number))
        if bench.peer and files:
            bench.say(f"llama-bench, round {number + 1} of {ROUNDS}")
            gguf = files.files["Q4_0"]
            sizes = {"prompt": PROMPT_TOKENS, "new": NEW_TOKENS, "threads": THREADS, "rounds": REPETITIONS}
            theirs.append(bench.peer.bench(gguf, **sizes))
    for key, title, name, share in (
        ("prompt_processing_throughput_tps", "prompt", "prompt_tps", 0.8),
        ("token_generation_throughput_tps", "generation", "generation_tps", 0.9),
    ):
        measured = [row[key] for one in ours for row in one["rows"]]
        yield row_beside(
            "serving",
            f"int4 {title}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {THREADS} threads",
            statistics.median(measured),
            "tok/s",
            peer=statistics.median(getattr(one, name) for one in theirs) if theirs else None,
            peer_name=PEER,
            at_least=share,
            all=measured,
            peer_rounds=[getattr(one, name) for one in theirs],
        )
    yield Row(
        key="serving",
        what="int4 load",
        measured=statistics.median(one["load_ms"] for one in ours),
        unit="ms",
        target="",
        met=None,
        details={
            "counts": "model and tokenizer, in a process that has imported onnxruntime-genai",
            "peer_ms_with_process_start_and_one_token": [1000 * one.start_s for one in theirs],
        },
    )
    size_bytes = ours[0]["size_bytes"]
    yield row_below(
        "serving",
        "int4 peak RSS when serving",
        max(one["peak_rss_bytes"] for one in ours) / 1e6,
        "MB",
        1.5 * size_bytes / 1e6 + 100,
        f"at most 1.5 x {size_bytes / 1e6:,.1f} MB + 100 MB",
        folder=folder.name,
        peer_peak_rss_bytes=max((one.peak_rss_bytes for one in theirs), default=None),
    )


def _measure(bench: Bench, number: int) -> dict[str, Any]:
    """Measure as a deploy does, without the sweep over prompt lengths, which is no part of these figures."""
    child = run_in_child(
        "infra.genai.measurement:measure",
        {
            "model_dir": str(bench.builds[0]["int4"].folder),
            "prompt_tokens": [PROMPT_TOKENS],
            "new_tokens": NEW_TOKENS,
            "warmup": 1,
            "repetitions": REPETITIONS,
            "threads": THREADS,
            "execution_provider": None,
            "sweep": None,
        },
        deadline_s=DEADLINE_S,
        log_path=bench.folder / f"measure-{number}.log",
        work_dir=bench.folder / "measure",
    )
    return child.value
