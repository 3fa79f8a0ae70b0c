"""The measurement of a model folder in onnxruntime-genai: speed, memory, and a sweep over prompt lengths."""

import os
import platform
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from slmops.infra.errors import StageFailed
from slmops.infra.genai.calls import Hardware, Measure, Measured, RequestFigures, Sweep, SweptRequest
from slmops.infra.genai.runtime import GenaiModel, package_versions
from slmops.infra.genai.sweep import SweepPlan, TimedRequest, sweep, sweep_lengths
from slmops.infra.genai.timing import benchmark_prompt, chat_prompt, time_request
from slmops.infra.process.call import Progress
from slmops.infra.process.load import OtherLoad
from slmops.infra.reference.chat_prompt import ChatPrompt

SAMPLE_INTERVAL_S = 0.02
MAX_ROUNDS = 3


def measure(call: Measure, progress: Progress) -> Measured:
    """Measure speed and memory by the method of onnxruntime-genai's own benchmark/python/benchmark_e2e.py.

    A request is one greedy generation of exactly `new_tokens` tokens after a prompt of exactly the requested length;
    `slmops.infra.genai.timing.time_request` defines its figures. tests/benchmarks/measurement_method.py
    compares them with that benchmark's.

    The sweep follows the measured requests, at lengths by `slmops.infra.genai.sweep.sweep_lengths`; its prompts are
    chats if the template leaves room for a text, otherwise plain text.

    Raises `StageFailed` for a model that cannot be run.
    """
    progress(0, 1, "loading the model")
    with PeakMemory() as memory:
        started = time.perf_counter()
        model = GenaiModel(call.model_dir, threads=call.threads, spin=True)
        load_ms = 1000 * (time.perf_counter() - started)
        notes: list[str] = []
        lengths = _lengths(call.prompt_tokens, call.new_tokens, model.context_length, notes)
        swept = _Sweep(model, call.sweep)
        runs = _Runs(model, call, lengths)
        steps = runs.steps + swept.steps
        best = runs.best_round(steps, progress)
    sweep_rows, sweep_notes = swept.run(best.rows, steps, progress)
    return Measured(
        load_ms=load_ms,
        rows=best.rows,
        cpu_percent=best.cpu_percent,
        peak_rss_bytes=memory.peak_rss_bytes,
        size_bytes=sum(path.stat().st_size for path in model.model_dir.rglob("*") if path.is_file()),
        notes=tuple(notes),
        sweep=tuple(sweep_rows),
        sweep_notes=tuple(sweep_notes),
        threads=call.threads,
        hardware=_hardware(),
        versions=package_versions(),
        others_cpu_share=best.others_cpu_share,
        rounds=runs.rounds,
    )


@dataclass(frozen=True)
class _Round:
    """The measured requests of all lengths, and the share of the measurement's cores that other programs used."""

    rows: tuple[RequestFigures, ...]
    cpu_percent: float
    others_cpu_share: float

    @property
    def spread(self) -> float:
        """The standard deviation of the first length's token generation, over its median; 0 for one request."""
        first = (self.rows[0].prompt_tokens, self.rows[0].new_tokens)
        rates = [
            row.token_generation_throughput_tps for row in self.rows if (row.prompt_tokens, row.new_tokens) == first
        ]
        return statistics.stdev(rates) / statistics.median(rates) if len(rates) > 1 else 0.0


class _Runs:
    """The measured requests of one model, in rounds: a disturbed round is repeated."""

    def __init__(self, model: GenaiModel, call: Measure, lengths: Sequence[tuple[int, int]]) -> None:
        self._model, self._call = model, call
        self._lengths = [(benchmark_prompt(model, prompt), new) for prompt, new in lengths]
        self.rounds = 0

    @property
    def steps(self) -> int:
        """Number of requests if no round is repeated."""
        return len(self._lengths) * (self._call.warmup + self._call.repetitions)

    def best_round(self, steps: int, progress: Progress) -> _Round:
        """Measure until a round is not disturbed, at most `MAX_ROUNDS` times; return it, or the least disturbed one."""
        done: list[_Round] = []
        while not done or (self.rounds < MAX_ROUNDS and self._is_disturbed(done[-1])):
            done.append(self._round(steps, progress))
            self.rounds += 1
        undisturbed = [found for found in done if not self._is_disturbed(found)]
        return (undisturbed or sorted(done, key=lambda found: (found.others_cpu_share, found.spread)))[0]

    def _is_disturbed(self, found: _Round) -> bool:
        call = self._call
        return found.others_cpu_share > call.max_others_cpu_share or found.spread > call.max_spread

    def _round(self, steps: int, progress: Progress) -> _Round:
        call, rows = self._call, []
        warmup, cpu_s, wall_s = call.warmup if self.rounds == 0 else 0, 0.0, 0.0
        with OtherLoad() as others:
            for line, (prompt_ids, new_tokens) in enumerate(self._lengths):
                done = line * (call.warmup + call.repetitions)
                for repetition in range(warmup):
                    progress(done + repetition, steps, "warm-up")
                    time_request(self._model, prompt_ids, new_tokens)
                cpu_before, wall_before = _cpu_s(), time.perf_counter()
                for repetition in range(call.repetitions):
                    progress(done + call.warmup + repetition, steps, "measuring")
                    figures = asdict(time_request(self._model, prompt_ids, new_tokens))
                    sizes = {"prompt_tokens": len(prompt_ids), "new_tokens": new_tokens, "repetition": repetition}
                    rows.append(RequestFigures(**sizes, **figures))
                cpu_s += _cpu_s() - cpu_before
                wall_s += time.perf_counter() - wall_before
        share = others.share_of(call.threads)
        return _Round(rows=tuple(rows), cpu_percent=100 * cpu_s / wall_s, others_cpu_share=share)


def _lengths(
    prompt_tokens: Sequence[int], new_tokens: int, context_length: int, notes: list[str]
) -> list[tuple[int, int]]:
    """Clip each (prompt, new) pair to the context, with a note; pairs that become equal by clipping are run once."""
    lengths: list[tuple[int, int]] = []
    for asked in prompt_tokens:
        new = min(new_tokens, max(2, context_length // 2))
        prompt = min(asked, context_length - new)
        if (prompt, new) != (asked, new_tokens):
            notes.append(
                f"{asked} prompt and {new_tokens} new tokens were clipped to {prompt} and {new}: "
                f"the model's context is {context_length}."
            )
        if (prompt, new) not in lengths:
            lengths.append((prompt, new))
    return lengths


class _Sweep:
    """The sweep of one model; it has no lengths if no sweep was requested."""

    def __init__(self, model: GenaiModel, asked: Sweep | None) -> None:
        self._model = model
        self._asked = asked
        self._lengths = sweep_lengths(model.context_length, asked.new_tokens, asked.max_prompt_tokens) if asked else []
        self._chat: ChatPrompt | None = None
        self._start_bytes = 0
        self._last_growth = (1, 0)  # prompt tokens, bytes

    @property
    def steps(self) -> int:
        """Number of requests if no length is omitted and none is measured again."""
        return len(self._lengths) * self._asked.repetitions if self._asked else 0

    def run(
        self, measured: Sequence[RequestFigures], steps: int, progress: Progress
    ) -> tuple[list[SweptRequest], list[str]]:
        """Return the sweep's rows and notes; the first length's time is predicted from the measured requests."""
        asked = self._asked
        if asked is None:
            return [], []
        if not self._lengths:
            return [], [f"No sweep: the model's context leaves no room for {asked.new_tokens} new tokens."]
        notes = []
        try:
            self._chat = chat_prompt(self._model)
        except StageFailed as error:
            notes.append(f"The sweep's answers were not judged: {error.message}")
        self._start_bytes = _rss_bytes()
        done = steps - self.steps

        def on_request(what: str) -> None:
            nonlocal done
            progress(min(done, steps), steps, what)
            done += 1

        prompt_tps = statistics.median(row.prompt_processing_throughput_tps for row in measured)
        generation_tps = statistics.median(row.token_generation_throughput_tps for row in measured)
        plan = SweepPlan(
            lengths=self._lengths,
            repetitions=asked.repetitions,
            budget_s=asked.budget_s,
            max_cliff_ratio=asked.max_cliff_ratio,
            first_s=self._lengths[0] / prompt_tps + asked.new_tokens / generation_tps,
        )
        request = partial(self._request, asked.new_tokens)
        rows, more_notes = sweep(plan, request, self._has_room, on_request)
        return rows, [*notes, *more_notes]

    def _request(self, new_tokens: int, prompt_tokens: int) -> TimedRequest:
        finite: list[bool] = []
        answer_ids: list[int] = []

        def check(logits: NDArray[np.float32]) -> None:
            finite.append(bool(np.isfinite(logits).all()))

        chat_ids = self._chat.of_length(prompt_tokens) if self._chat else None
        prompt_ids = benchmark_prompt(self._model, prompt_tokens) if chat_ids is None else chat_ids
        with PeakMemory() as memory:
            timing = time_request(self._model, prompt_ids, new_tokens, on_logits=check, on_answer=answer_ids.extend)
        self._last_growth = (prompt_tokens, memory.peak_rss_bytes - self._start_bytes)
        return TimedRequest(
            new_tokens=new_tokens,
            ttft_ms=timing.ttft_ms,
            token_generation_throughput_tps=timing.token_generation_throughput_tps,
            e2e_latency_ms=timing.e2e_latency_ms,
            finite_logits=all(finite),
            answered=None if chat_ids is None else bool(self._model.decode(answer_ids)),
        )

    def _has_room(self, prompt_tokens: int) -> bool:
        """Whether a longer prompt would fit if memory grew by the square of its length, as in naive attention."""
        last, growth = self._last_growth
        used_bytes = _rss_bytes() - self._start_bytes
        return bool(growth * (prompt_tokens / last) ** 2 - used_bytes < psutil.virtual_memory().available)


class PeakMemory:
    """Samples the resident memory of this process while it is entered.

    The runtime starts no process of its own, and reading the process tree would take time from the core that runs the
    timed requests.
    """

    def __init__(self) -> None:
        self.peak_rss_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        self.peak_rss_bytes = max(self.peak_rss_bytes, _rss_bytes())


def _rss_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _cpu_s() -> float:
    return float(sum(psutil.Process().cpu_times()[:2]))


def _hardware() -> Hardware:
    return Hardware(
        cpu=cpu_model(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=os.cpu_count(),
        ram_bytes=psutil.virtual_memory().total,
        os=platform.platform(),
        machine=platform.machine(),
    )


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
