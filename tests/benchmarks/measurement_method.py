"""Compare our measurement with the method of onnxruntime-genai's own benchmark/python/benchmark_e2e.py.

Run as `python -m tests.benchmarks.measurement_method [--rounds 61] [--precision int4] [--top-k 1]`; needs about 1 GB of
memory and two minutes, on a machine that does nothing else. It builds a model of 41 M parameters with random weights
and makes requests by either method in turn, each method with the model that it opened itself: the same prompt, the same
number of new tokens. Prints the medians of TTFT, prompt and token generation throughput, and the median of each round's
ratio with its 95 % bootstrap interval, then all of it as one JSON line. Ends with status 1 unless every ratio is within
0.95 and 1.05; an interval wider than that says that the machine was too busy to tell.

The other method is written anew from that file as of onnxruntime-genai 0.16 (commit a0c04eb13), whose default options
are kept but for two. Its `--top_k` is 50, so that it samples, and 1 here, as what is compared must decode alike;
`--top-k 50` shows what sampling costs. It leaves the number of threads to the runtime, which takes half of the logical
cores where a folder names none; here both have `--threads`, the physical cores, as slmops sets them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import psutil

from slmops.infra.genai.measurement import PeakMemory
from slmops.infra.genai.runtime import GenaiModel, package_versions
from slmops.infra.genai.timing import benchmark_prompt, time_request
from slmops.tasks.exams.estimates import ratio_of_medians
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.genai_models import build_genai_model

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "head_dim": 64,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
}
METRICS = ("ttft_ms", "prompt_processing_throughput_tps", "token_generation_throughput_tps")
WITHIN = (0.95, 1.05)
WARMUP = 5  # benchmark_e2e.py's default

Method = Callable[[], dict[str, float]]


def our_method(folder: Path, prompt_tokens: int, new_tokens: int, threads: int) -> Method:
    """Make requests as the child function `measure` does, its watch over the memory included."""
    model = GenaiModel(folder, threads=threads)
    prompt_ids = benchmark_prompt(model, prompt_tokens)

    def request() -> dict[str, float]:
        with PeakMemory():
            figures = time_request(model, prompt_ids, new_tokens)
        return {name: getattr(figures, name) for name in METRICS}

    return request


def genai_method(folder: Path, prompt_tokens: int, new_tokens: int, threads: int, top_k: int) -> Method:
    """Make requests as one repetition of benchmark_e2e.py: prompt, first token and further tokens timed apart."""
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    words = tokenizer.encode("The quick brown fox jumps over the lazy dog, and then it rests in the warm sun. ")
    prompt_ids = [int(words[place % len(words)]) for place in range(prompt_tokens)]
    params = og.GeneratorParams(model)
    length = prompt_tokens + new_tokens
    params.set_search_options(
        do_sample=top_k > 1,
        top_k=top_k,
        top_p=1.0,
        temperature=1.0,
        max_length=length,
        min_length=length,
        batch_size=1,
    )

    def request() -> dict[str, float]:
        generator = og.Generator(model, params)
        prompt_s = _seconds(lambda: generator.append_tokens(prompt_ids))
        sampling_s = _seconds(lambda: (generator.generate_next_token(), generator.is_done()))
        steps_s: list[float] = []
        while not generator.is_done() and generator.token_count() < length:
            steps_s.append(_seconds(lambda: (generator.generate_next_token(), generator.is_done())))
        assert len(steps_s) == new_tokens - 1
        return {
            "ttft_ms": 1000 * (prompt_s + sampling_s),
            "prompt_processing_throughput_tps": prompt_tokens / prompt_s,
            "token_generation_throughput_tps": 1 / statistics.fmean(steps_s),
        }

    return request


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def compare(ours: Method, theirs: Method, rounds: int) -> dict[str, dict[str, float]]:
    """Return each metric's medians, and the median of each round's ratio, ours over theirs.

    A round is one request by either method, and each turns the order around: what else the machine does drifts from
    minute to minute, and the two requests of a round have the same share of it.
    """
    for method in (ours, theirs):
        for _ in range(WARMUP):
            method()
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        order = [("ours", ours), ("theirs", theirs)]
        for name, method in order if number % 2 == 0 else reversed(order):
            found[name].append(method())
    table = {}
    for metric in METRICS:
        medians = {name: statistics.median(row[metric] for row in rows) for name, rows in found.items()}
        ratios = [own[metric] / other[metric] for own, other in zip(found["ours"], found["theirs"], strict=True)]
        estimate = ratio_of_medians([1.0], ratios)
        table[metric] = {**medians, "ratio": estimate.value, "low": estimate.low, "high": estimate.high}
    return table


def build(folder: Path, precision: str) -> Path:
    """Build the model with random weights by slmops' own engine."""
    return build_genai_model(make_tiny_checkpoint(folder / "checkpoint", "qwen2", **SHAPE), folder / "model", precision)


def main() -> int:
    """Print the comparison; 0 when the methods agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--precision", default="int4", choices=["fp32", "int8", "int4"])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--model", type=Path, help="an onnxruntime-genai folder in place of the one that is built")
    arguments = parser.parse_args()
    sizes = (arguments.prompt_tokens, arguments.new_tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.model or build(Path(name), arguments.precision)
        ours = our_method(folder, *sizes, arguments.threads)
        theirs = genai_method(folder, *sizes, arguments.threads, arguments.top_k)
        table = compare(ours, theirs, arguments.rounds)
    print(f"{'metric':34}{'ours':>10}{'theirs':>10}{'ratio':>8}  95 %")
    for metric, row in table.items():
        figures = f"{row['ours']:10.2f}{row['theirs']:10.2f}{row['ratio']:8.3f}"
        print(f"{metric:34}{figures}  {row['low']:.3f} to {row['high']:.3f}")
    agree = all(WITHIN[0] <= row["ratio"] <= WITHIN[1] for row in table.values())
    options = {**vars(arguments), "model": str(arguments.model or "")}
    print(json.dumps({"agree": agree, "within": WITHIN, "metrics": table, **options, "versions": package_versions()}))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
