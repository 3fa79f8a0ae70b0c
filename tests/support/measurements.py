"""Measurements with made-up figures, as the child function gives them and as records."""

import statistics
from collections.abc import Sequence
from typing import Any

from slmops.infra.genai.calls import Measured
from slmops.tasks.exams.measurement import Measurement, summarize

HARDWARE: dict[str, Any] = {
    "cpu": "x",
    "physical_cores": None,
    "logical_cores": 2,
    "ram_bytes": 8_000_000_000,
    "os": "Linux-6.1",
    "machine": "z",
}


def raw_row(prompt_tokens: int, repetition: int, value: float, gaps: Sequence[float]) -> dict[str, Any]:
    """A measured request with a TTFT of `value` ms and these inter-token latencies in ms."""
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(gaps) + 1,
        "repetition": repetition,
        "ttft_ms": value,
        "prompt_processing_throughput_tps": 1000 * prompt_tokens / value,
        "token_generation_throughput_tps": 1000 / statistics.fmean(gaps),
        "inter_token_latency_ms": statistics.fmean(gaps),
        "inter_token_latencies_ms": list(gaps),
        "e2e_latency_ms": value + sum(gaps),
    }


def swept_row(prompt_tokens: int, ttft_ms: float, tps: float = 100.0, **changes: Any) -> dict[str, Any]:
    """A request of the sweep."""
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": 8,
        "repetition": 0,
        "round": 0,
        "ttft_ms": ttft_ms,
        "token_generation_throughput_tps": tps,
        "finite_logits": True,
        "answered": True,
    } | changes


def raw_result(rows: Sequence[dict[str, Any]], **changes: Any) -> Measured:
    """What a child process measures."""
    figures = {
        "load_ms": 12.5,
        "rows": list(rows),
        "cpu_percent": 180.0,
        "peak_rss_bytes": 1000,
        "size_bytes": 500,
        "notes": ["clipped"],
        "sweep": [],
        "sweep_notes": [],
        "threads": 2,
        "hardware": HARDWARE,
        "versions": {"onnxruntime": "1"},
    }
    return Measured(**figures | changes)


def make_measurement(
    ttfts_ms: Sequence[float] = (10.0, 11.0, 12.0), gap_ms: float = 2.0, **changes: Any
) -> Measurement:
    """A measurement of requests of 128 prompt and 3 new tokens with these TTFTs and this inter-token latency."""
    rows = [raw_row(128, index, ttft, [gap_ms, gap_ms]) for index, ttft in enumerate(ttfts_ms)]
    older = {name: changes.pop(name) for name in ("execution_provider",) if name in changes}  # no child says it now
    return summarize(raw_result(rows, **changes), warmup=1, wall_s=3.0).model_copy(update=older)
