"""History: the figures of a version that are better or worse, beyond noise, than those of an earlier version."""

import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import FiniteFloat

from slmops.infra.genai.calls import Hardware, RequestFigures
from slmops.infra.records import Record
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.exams.answers import EVALUATION
from slmops.tasks.exams.estimates import Estimate, paired_loss, ratio_of_medians, weighted_mean
from slmops.tasks.exams.evaluation import EvaluatedRow, Evaluation
from slmops.tasks.exams.measurement import Measurement, MetricName, measurements_of

Trend = Literal["better", "worse", "same"]

# The interval reflects how requests vary within a run. Between runs of the same files, clock speed and other load move
# medians by a few percent more, so a smaller change is ignored even if its interval is narrow.
MATERIAL_SPEED_CHANGE = 0.05
# Each run has one figure, without an interval, which depends on the allocator.
MATERIAL_MEMORY_CHANGE = 0.10
MATERIAL_SIZE_CHANGE = 0.01  # size is exact; smaller changes come from the files that describe the model
MATERIAL_KL_CHANGE = 0.05
# The newest of each side: enough for their spread, and few enough to follow changes of the machine.
COMPARED_MEASUREMENTS = 5
RAM_TOLERANCE = 0.01  # the reported memory size differs slightly between kernels

SPEED_METRICS: tuple[tuple[MetricName, Literal["higher", "lower"]], ...] = (
    ("ttft_ms", "lower"),
    ("prompt_processing_throughput_tps", "higher"),
    ("token_generation_throughput_tps", "higher"),
)


class Change(Record):
    """One metric of one precision before and after.

    `change` is after over before for speed, memory and size (1: no change), after minus before for a task score and for
    the KL divergence (nats per token).
    """

    precision: str
    metric: str
    before: FiniteFloat
    after: FiniteFloat
    change: Estimate
    trend: Trend


class History(Record):
    """The comparison with one earlier version; `notes` report what could not be compared and why."""

    previous: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


class Figures(Record):
    """The stored figures of one precision of one version: its measurements, oldest first, and an evaluation."""

    measurements: tuple[Measurement, ...] = ()
    evaluation: Evaluation | None = None


class Comparison(Record):
    """The changes of one precision, and notes on figures that could not be compared or need an explanation.

    `earlier_measurements` is the number of earlier measurements that could be compared.
    """

    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    earlier_measurements: int = 0


def compare_versions(precision: str, earlier: Figures, later: Figures) -> Comparison:
    """Compare one precision's figures; pure.

    On each side, the newest five measurements count that have the same conditions as the newest later one:
    hardware, system, threads, execution provider, numbers of prompt and new tokens.

    Speed: `ratio_of_medians` over the raw requests of the first prompt length, a side's measurements together. A trend
    needs an interval without 1, a change of more than 5 %, and medians of the later measurements that are all beyond
    those of the earlier ones. Memory: the same over the measurements' peaks, with 10 %. Size: exact, at least 1 %. Task
    score and KL divergence: row by row, if both were judged on the same rows, by an interval without 0; the KL
    divergence also needs a change of at least 5 %.
    """
    changes: list[Change] = []
    notes: list[str] = []
    compared = 0
    if earlier.measurements and later.measurements:
        compared = _compare_measurements(precision, earlier.measurements, later.measurements, changes, notes)
    elif later.measurements:
        notes.append(f"{precision}: there is no earlier measurement by the present method.")
    if earlier.evaluation and later.evaluation:
        _compare_evaluations(precision, earlier.evaluation, later.evaluation, changes, notes)
    return Comparison(changes=tuple(changes), notes=tuple(notes), earlier_measurements=compared)


def _compare_measurements(
    precision: str,
    earlier: Sequence[Measurement],
    later: Sequence[Measurement],
    changes: list[Change],
    notes: list[str],
) -> int:
    """Add what can be compared; returns how many earlier measurements could be."""
    newest = later[-1]
    before_bytes, after_bytes = (float(measurement.metrics["size_bytes"]) for measurement in (earlier[-1], newest))
    ratio = after_bytes / before_bytes
    size = Change(
        precision=precision,
        metric="size_bytes",
        before=before_bytes,
        after=after_bytes,
        change=Estimate(value=ratio, low=ratio, high=ratio),
        trend=_trend(ratio - 1, MATERIAL_SIZE_CHANGE, "lower"),
    )
    before = [measurement for measurement in earlier if not _differences(measurement, newest)][-COMPARED_MEASUREMENTS:]
    after = [measurement for measurement in later if not _differences(measurement, newest)][-COMPARED_MEASUREMENTS:]
    if not before:
        differences = ", ".join(_differences(earlier[-1], newest))
        notes.append(
            f"{precision}: speed and memory cannot be compared, because the earlier measurement has {differences}."
        )
        changes.append(size)
        return 0
    if not newest.reliable:
        notes.append(f"{precision}: the machine was busy during the newest measurement, which may explain its changes.")
    if before[-1].versions != newest.versions:
        notes.append(f"{precision}: measured with {_versions(before[-1])} before and with {_versions(newest)} now.")
    for metric, better in SPEED_METRICS:
        values = [[_values(measurement.rows, metric) for measurement in side] for side in (before, after)]
        changes.append(_change(precision, metric, values[0], values[1], MATERIAL_SPEED_CHANGE, better))
    peaks = [[[float(measurement.metrics["peak_rss_bytes"])] for measurement in side] for side in (before, after)]
    changes.append(_change(precision, "peak_rss_bytes", peaks[0], peaks[1], MATERIAL_MEMORY_CHANGE, "lower"))
    changes.append(size)
    return len(before)


def _differences(earlier: Measurement, later: Measurement) -> list[str]:
    """The conditions in which two measurements differ, with the earlier one's values."""
    old, new = earlier.hardware, later.hardware
    found = [
        f"{title} {_text(getattr(old, name))}, not {_text(getattr(new, name))}"
        for name, title in (
            ("cpu", "the processor"),
            ("machine", "the architecture"),
            ("physical_cores", "physical cores"),
            ("logical_cores", "logical cores"),
        )
        if getattr(old, name) != getattr(new, name)
    ]
    if abs(old.ram_bytes / new.ram_bytes - 1) > RAM_TOLERANCE:
        found.append(f"{old.ram_bytes / 1e9:.1f} GB of memory, not {new.ram_bytes / 1e9:.1f}")
    if _system(old) != _system(new):
        found.append(f"the system {_system(old)}, not {_system(new)}")
    if earlier.threads != later.threads:
        found.append(f"{earlier.threads} threads, not {later.threads}")
    if earlier.execution_provider != later.execution_provider:
        providers = (_text(measurement.execution_provider) for measurement in (earlier, later))
        found.append("the execution provider {}, not {}".format(*providers))
    if _lengths(earlier) != _lengths(later):
        found.append("other numbers of prompt or new tokens")
    return found


def _text(value: object) -> str:
    return "unknown" if value is None else str(value)


def _system(hardware: Hardware) -> str:
    return hardware.os.split("-", maxsplit=1)[0]


def _versions(measurement: Measurement) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(measurement.versions.items()))


def _lengths(measurement: Measurement) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row.prompt_tokens, row.new_tokens) for row in measurement.rows))


def _values(rows: Sequence[RequestFigures], metric: str) -> list[float]:
    """The raw figures of the first prompt length, from which the flat metrics come too."""
    first = (rows[0].prompt_tokens, rows[0].new_tokens)
    return [float(getattr(row, metric)) for row in rows if (row.prompt_tokens, row.new_tokens) == first]


def _change(
    precision: str,
    metric: str,
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    material: float,
    better: Literal["higher", "lower"],
) -> Change:
    """Compare the runs before with the runs after, each a list of positive figures."""
    pooled_before, pooled_after = ([value for run in runs for value in run] for runs in (before, after))
    estimate = ratio_of_medians(pooled_before, pooled_after)
    runs_before, runs_after = ([statistics.median(run) for run in runs] for runs in (before, after))
    apart = max(runs_after) < min(runs_before) or min(runs_after) > max(runs_before)
    certain = apart and not estimate.low <= 1 <= estimate.high
    return Change(
        precision=precision,
        metric=metric,
        before=statistics.median(pooled_before),
        after=statistics.median(pooled_after),
        change=estimate,
        trend=_trend(estimate.value - 1, material, better) if certain else "same",
    )


def _trend(change: float, material: float, better: Literal["higher", "lower"]) -> Trend:
    if abs(change) <= material:
        return "same"
    return "better" if (change > 0) == (better == "higher") else "worse"


def _compare_evaluations(
    precision: str, earlier: Evaluation, later: Evaluation, changes: list[Change], notes: list[str]
) -> None:
    if earlier.rows_sha256 != later.rows_sha256:
        notes.append(f"{precision}: quality cannot be compared, because the earlier version was judged on other rows.")
        return
    old = {row.id: row for row in earlier.rows}
    pairs = [(old[row.id], row) for row in later.rows if row.id in old]
    scored = [
        (before, after)
        for before, after in ((_score(first), _score(second)) for first, second in pairs)
        if before is not None and after is not None
    ]
    if scored:
        scores = [[float(value) for value in side] for side in zip(*scored, strict=True)]
        estimate = paired_loss(scores[1], scores[0])
        changes.append(
            Change(
                precision=precision,
                metric="score",
                before=statistics.fmean(scores[0]),
                after=statistics.fmean(scores[1]),
                change=estimate,
                trend="better" if estimate.low > 0 else "worse" if estimate.high < 0 else "same",
            )
        )
    diverging = [
        (first.kl_divergence, second.kl_divergence, (first.positions + second.positions) / 2)
        for first, second in pairs
        if first.kl_divergence is not None and second.kl_divergence is not None and first.positions and second.positions
    ]
    if diverging:
        changes.append(_kl_change(precision, diverging))
    elif later.has_reference:
        notes.append(f"{precision}: the KL divergence cannot be compared, because one of the two is not finite.")


def _kl_change(precision: str, rows: Sequence[tuple[float, float, float]]) -> Change:
    """Compare rows of (before, after, positions); each row has the weight of its compared positions."""
    weights = [weight for _, _, weight in rows]
    before, after = (weighted_mean([row[side] for row in rows], weights).value for side in (0, 1))
    estimate = weighted_mean([row[1] - row[0] for row in rows], weights)
    material = abs(estimate.value) > MATERIAL_KL_CHANGE * before
    certain = estimate.low > 0 or estimate.high < 0
    trend: Trend = "same"
    if material and certain:
        trend = "worse" if estimate.value > 0 else "better"
    return Change(precision=precision, metric="kl_divergence", before=before, after=after, change=estimate, trend=trend)


def _score(row: EvaluatedRow) -> float | None:
    if row.score is not None:
        return row.score
    return None if row.exact_match is None else float(row.exact_match)


def history_of(version: Version, threads: int) -> History | None:
    """Compare a version with the newest earlier one of its name by stored evidence; None for the first version.

    Evidence from another machine or with another number of threads is not compared.
    """
    earlier = [known for known in version.registry.versions(version.name) if known.number < version.number]
    if not earlier:
        return None
    previous = earlier[-1]
    changes: list[Change] = []
    notes: list[str] = []
    known = {variant.precision: variant for variant in previous.variants}
    for variant in version.variants:
        if variant.precision not in known:
            notes.append(f"{variant.precision}: {previous.reference} has none.")
            continue
        later = _figures(variant, threads=threads)
        rows_sha256 = later.evaluation.rows_sha256 if later.evaluation else None
        found = compare_versions(variant.precision, _figures(known[variant.precision], rows_sha256=rows_sha256), later)
        changes += found.changes
        notes += found.notes
    return History(previous=previous.reference, changes=tuple(changes), notes=tuple(notes))


def _figures(variant: Variant, *, threads: int | None = None, rows_sha256: str | None = None) -> Figures:
    """Return the stored figures of a variant; with `rows_sha256`, the evaluation on these rows if there is one."""
    evaluations = variant.version.all(EVALUATION, where=lambda content: content.get("precision") == variant.precision)
    fitting = [evaluation for evaluation in evaluations if evaluation.rows_sha256 == rows_sha256]
    return Figures(
        measurements=tuple(
            measurement for measurement in measurements_of(variant) if threads in (None, measurement.threads)
        ),
        evaluation=next(reversed(fitting or evaluations), None),
    )
