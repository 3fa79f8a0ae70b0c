"""Measurement: a variant's speed, memory and size on the serving runtime."""

import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import FiniteFloat

from slmops.infra.errors import StageFailed
from slmops.infra.genai.calls import Hardware, Measure, Measured, RequestFigures, Sweep, SweptRequest
from slmops.infra.records import Json, Record, later_field
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.version import Variant
from slmops.tasks.environment.host import host_facts
from slmops.tasks.exams.exam import Bench, Exam
from slmops.tasks.workshop import Workshop

MetricName = Literal[
    "load_ms",
    "ttft_ms",
    "prompt_processing_throughput_tps",
    "token_generation_throughput_tps",
    "inter_token_latency_ms",
    "e2e_latency_ms",
    "peak_rss_bytes",
    "cpu_percent",
    "size_bytes",
]
PER_REQUEST: tuple[MetricName, ...] = (
    "ttft_ms",
    "prompt_processing_throughput_tps",
    "token_generation_throughput_tps",
    "inter_token_latency_ms",
    "e2e_latency_ms",
)
PER_PROCESS: tuple[MetricName, ...] = ("load_ms", "peak_rss_bytes", "cpu_percent", "size_bytes")
# Increased whenever the meaning of a figure changes: older evidence is neither reused nor compared. 2: TTFT
# without making the generator, memory of the measured process alone, and the sweep.
MEASUREMENT_SCHEMA = 2
# Beyond these a round of requests is disturbed. A share of the cores means lost time of the requests. With a relative
# standard deviation of 25 %, the median of five requests has a standard error of 14 % (1.2533 s / sqrt(n), normal
# theory), which exceeds the changes that history reports.
MAX_OTHERS_CPU_SHARE = 0.10
MAX_SPREAD = 0.25
QUANTILE_METHOD = "linear interpolation between order statistics (Hyndman and Fan 1996, type 7)"


class Statistics(Record):
    """Median, 95th percentile and sample standard deviation of `count` values; `stdev` is None for a single one."""

    p50: FiniteFloat
    p95: FiniteFloat
    stdev: FiniteFloat | None
    count: int


class PromptLengthStatistics(Record):
    """Statistics of the requests of one prompt length; those of the inter-token latency are over all decoding steps."""

    prompt_tokens: int
    new_tokens: int
    statistics: dict[MetricName, Statistics]


class Measurement(Record):
    """The measured figures of a variant.

    `metrics` has one figure per name: medians over the requests of the first prompt length, and the process's own
    figures (`cpu_percent`: 100 is one core busy). `by_prompt_length` has every length's statistics, `rows` the raw
    figures of every request; `sweep` those of the sweep over prompt lengths, which no other figure counts.
    `others_cpu_share` is the share of the cores for its threads that other programs took during the requests, which are
    the least disturbed of `rounds`; None: not recorded.
    """

    metrics: dict[MetricName, FiniteFloat | int]
    by_prompt_length: tuple[PromptLengthStatistics, ...]
    rows: tuple[RequestFigures, ...]
    quantile_method: str
    warmup: int
    notes: tuple[str, ...]
    sweep: tuple[SweptRequest, ...] = ()
    sweep_notes: tuple[str, ...] = ()
    threads: int
    others_cpu_share: FiniteFloat | None = later_field(None)
    rounds: int = later_field(1)
    execution_provider: str | None = None  # older records may name a provider; None: that of the folder
    hardware: Hardware
    versions: dict[str, str]
    wall_s: FiniteFloat

    @property
    def spread(self) -> float:
        """The standard deviation of the first prompt length's token generation throughput, over its median."""
        rates = self.by_prompt_length[0].statistics["token_generation_throughput_tps"]
        return (rates.stdev or 0.0) / rates.p50

    @property
    def reliable(self) -> bool:
        """Whether the figures of speed are not disturbed by a busy machine.

        Records without the share of others count as reliable.
        """
        return self.others_cpu_share is None or (
            self.others_cpu_share <= MAX_OTHERS_CPU_SHARE and self.spread <= MAX_SPREAD
        )

    @property
    def warning(self) -> str | None:
        """A warning about figures that are not reliable."""
        if self.reliable or self.others_cpu_share is None:
            return None
        return (
            f"The figures of speed are not reliable: in the best of {self.rounds} rounds other programs used "
            f"{self.others_cpu_share:.0%} of the measurement's cores, and requests differed by "
            f"{self.spread:.0%} of their median. Deploy again on an idle machine."
        )


def statistics_of(values: Sequence[float]) -> Statistics:
    """Statistics of at least one finite value; quantiles by `QUANTILE_METHOD`."""
    single = len(values) == 1
    return Statistics(
        p50=statistics.median(values),
        p95=values[0] if single else statistics.quantiles(values, n=20, method="inclusive")[-1],
        stdev=None if single else statistics.stdev(values),
        count=len(values),
    )


def summarize(measured: Measured, *, warmup: int, wall_s: float) -> Measurement:
    """Make the record from the child's raw figures.

    Raises `StageFailed` when nothing was measured.
    """
    rows = measured.rows
    if not rows:
        raise StageFailed(
            "The benchmark ran no request.",
            "Set at least one repetition and one prompt length.",
            code="nothing-measured",
        )
    lengths = list(dict.fromkeys((row.prompt_tokens, row.new_tokens) for row in rows))
    by_length = tuple(
        _statistics_by_length([row for row in rows if (row.prompt_tokens, row.new_tokens) == length])
        for length in lengths
    )
    process = {name: getattr(measured, name) for name in PER_PROCESS}
    medians = {name: by_length[0].statistics[name].p50 for name in PER_REQUEST}
    return Measurement(
        metrics={"load_ms": process["load_ms"], **medians, **process},
        by_prompt_length=by_length,
        rows=rows,
        quantile_method=QUANTILE_METHOD,
        warmup=warmup,
        notes=measured.notes,
        sweep=measured.sweep,
        sweep_notes=measured.sweep_notes,
        threads=measured.threads,
        others_cpu_share=measured.others_cpu_share,
        rounds=measured.rounds,
        hardware=measured.hardware,
        versions=measured.versions,
        wall_s=wall_s,
    )


def _statistics_by_length(rows: Sequence[RequestFigures]) -> PromptLengthStatistics:
    values: dict[MetricName, list[float]] = {name: [getattr(row, name) for row in rows] for name in PER_REQUEST}
    values["inter_token_latency_ms"] = [gap for row in rows for gap in row.inter_token_latencies_ms]
    return PromptLengthStatistics(
        prompt_tokens=rows[0].prompt_tokens,
        new_tokens=rows[0].new_tokens,
        statistics={name: statistics_of(numbers) for name, numbers in values.items()},
    )


def measure_variant(settings: Settings, bench: Bench) -> Measurement:
    """Measure a genai model folder, the bench's, in a child process of its own.

    Raises `StageFailed` and its kinds.
    """
    benchmark = settings.benchmark
    child = bench.run(
        Measure(
            model_dir=bench.model,
            prompt_tokens=benchmark.prompt_tokens,
            new_tokens=benchmark.new_tokens,
            warmup=benchmark.warmup,
            repetitions=benchmark.repetitions,
            threads=settings.threads,
            max_others_cpu_share=MAX_OTHERS_CPU_SHARE,
            max_spread=MAX_SPREAD,
            sweep=Sweep(**settings.sweep.model_dump(), max_cliff_ratio=settings.gate.max_cliff_ratio),
        ),
        settings.timeout.measure_s,
    )
    # The supervisor's peak memory would include that of the sweep's long prompts.
    return summarize(child.value, warmup=benchmark.warmup, wall_s=child.wall_s)


MEASUREMENT = Kind("measurement", Measurement, field="measurement")


class MeasurementExam(Exam[Measurement]):
    """Speed and size of a variant on this machine."""

    kind, name, done_before = MEASUREMENT, "measure", "measured before"

    def question(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.question`."""
        return {
            "schema": MEASUREMENT_SCHEMA,
            "variant": variant.digest,
            "benchmark": settings.benchmark.model_dump(mode="json"),
            "sweep": settings.sweep.model_dump(mode="json"),
            "max_cliff_ratio": settings.gate.max_cliff_ratio,
            "threads": settings.threads,
            "host": {**host_facts()},
        }

    def stands(self, found: Measurement) -> bool:
        """See `Exam.stands`: a busy machine's figures are measured again."""
        return found.reliable

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> Measurement:
        """See `Exam.take`."""
        return measure_variant(shop.settings, bench)


def measurements_of(variant: Variant) -> list[Measurement]:
    """Return a variant's stored measurements, oldest first; those by another method are left out."""
    asked = (MEASUREMENT_SCHEMA, variant.digest)
    return variant.version.all(
        MEASUREMENT, where=lambda content: (content.get("schema"), content.get("variant")) == asked
    )
