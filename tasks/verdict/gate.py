"""The gate: it decides from measurements whether a variant may be served."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, ValidationError

from slmops.infra.errors import BadInput
from slmops.infra.records import Record
from slmops.infra.reference.answers import Share
from slmops.infra.settings import GateSettings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.version import Variant
from slmops.tasks.exams.endurance import Endurance
from slmops.tasks.exams.estimates import Estimate
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.length_sweep import LengthSweep
from slmops.tasks.exams.template_parity import TemplateParity
from slmops.tasks.exams.text import TextComparison
from slmops.tasks.runs.stage import stage


class GateThresholds(Record):
    """Thresholds for a variant: shares, nats per token, bytes per request, and a factor."""

    min_top1_agreement: Share
    max_kl_divergence: Annotated[FiniteFloat, Field(ge=0)]
    max_quality_loss: Share
    min_output_conformity: Share
    max_memory_growth_bytes_per_request: Annotated[int, Field(ge=0)]
    max_cliff_ratio: Annotated[FiniteFloat, Field(gt=1)]


# By precision: top-1 agreement at least, mean KL divergence at most, task score at most this much below the
# reference's. DESIGN.md, section 8; fp32 has the thresholds of fp16.
DEFAULT_THRESHOLDS: dict[str, dict[str, float]] = {
    precision: {"min_top1_agreement": top1, "max_kl_divergence": kl, "max_quality_loss": loss}
    for precision, top1, kl, loss in (
        ("fp32", 0.99, 0.005, 0.02),
        ("fp16", 0.99, 0.005, 0.02),
        ("int8", 0.97, 0.02, 0.02),
        ("int4", 0.90, 0.10, 0.05),
    )
}


def thresholds_for(
    precision: str,
    settings: GateSettings,
    *,
    min_top1_agreement: float | None = None,
    max_kl_divergence: float | None = None,
    max_quality_loss: float | None = None,
) -> GateThresholds:
    """The precision's thresholds; a setting overrides the default of every precision, a parameter overrides both.

    Raises `BadInput` for an unknown precision or a threshold out of its bounds.
    """
    if precision not in DEFAULT_THRESHOLDS:
        known = ", ".join(DEFAULT_THRESHOLDS)
        raise BadInput(
            f"There are no gate thresholds for the precision {precision!r}.",
            f"Use one of {known}.",
            code="gate-precision-unknown",
        )
    parameters = {
        "min_top1_agreement": min_top1_agreement,
        "max_kl_divergence": max_kl_divergence,
        "max_quality_loss": max_quality_loss,
    }
    values: dict[str, Any] = {
        **DEFAULT_THRESHOLDS[precision],
        "min_output_conformity": settings.min_output_conformity,
        "max_memory_growth_bytes_per_request": settings.max_memory_growth_bytes_per_request,
        "max_cliff_ratio": settings.max_cliff_ratio,
    }
    for name, parameter in parameters.items():
        setting: float | None = getattr(settings, name)
        values[name] = next(value for value in (parameter, setting, values[name]) if value is not None)
    try:
        return GateThresholds(**values)
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}" for fault in error.errors())
        raise BadInput(
            f"Gate thresholds are not valid: {faults}.", "Correct them.", code="gate-threshold-not-valid"
        ) from None


CheckName = Literal[
    "vocabulary",
    "finite_logits",
    "top1_agreement",
    "kl_divergence",
    "quality_loss",
    "output_format",
    "non_empty_answers",
    "template_parity",
    "memory_growth_genai",
    "memory_growth_foundry",
    "valid_lengths",
    "steadiness",
    "edge_input_genai",
    "edge_input_foundry",
    "text_top1_agreement",
    "text_kl_divergence",
]


class GateCheck(Record):
    """One comparison with a threshold; `value` is None without a finite figure, and the check fails then.

    `low` and `high` are the bounds of the figure's interval, if it has one. `decided` is false if that interval
    contains the threshold: the check neither passed nor failed, and does not prevent a variant from passing.
    """

    name: CheckName
    value: FiniteFloat | None
    threshold: FiniteFloat
    bound: Literal["at least", "at most"]
    passed: bool
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    decided: bool = True
    detail: str = ""


class GateVerdict(Record):
    """The gate's decision: passed if every check passed. `notes` report what could not be judged, and anomalies."""

    passed: bool
    checks: tuple[GateCheck, ...]
    notes: tuple[str, ...] = ()

    @property
    def failed_checks(self) -> tuple[GateCheck, ...]:
        """The checks that prevent the variant from being served."""
        return tuple(check for check in self.checks if not check.passed)


def judge(
    evaluation: Evaluation,
    thresholds: GateThresholds,
    *,
    length_sweep: LengthSweep | None = None,
    parity: TemplateParity | None = None,
    text: TextComparison | None = None,
    endurance: Sequence[Endurance] = (),
) -> GateVerdict:
    """Decide whether a variant may be registered. Figures that were not measured are not judged.

    Against the source checkpoint, where there is one: the same `vocabulary`, `top1_agreement` (at least) and
    `kl_divergence` (at most) on the evaluation set and on the user's text, and `quality_loss`: the reference's score
    minus the variant's on the same rows (at most). A loss counts as failed only when its interval lies beyond the
    threshold, as passed when it lies within, and is not decided otherwise: then the distributions decide.

    Of the variant alone: `finite_logits` (all), `output_format` (share of answers, at least), `non_empty_answers`
    (all; only without a reference), `template_parity` (differences, none), `memory_growth_*` (bytes per request, at
    most, failed only when its interval lies beyond), `valid_lengths` (prompt lengths without a valid answer, none),
    `steadiness` (largest loss of throughput from one prompt length to the next, at most), `edge_input_*` (inputs that
    ended in a crash or left the runtime unusable, none).
    """
    checks = [*_against_reference(evaluation, thresholds), *_of_answers(evaluation, thresholds)]
    if text is not None:
        checks += _on_text(text, thresholds)
    if parity is not None:
        checks.append(_count("template_parity", _parity_faults(parity)))
    if length_sweep is not None:
        invalid = [f"{length} tokens" for length in length_sweep.invalid_prompt_tokens]
        checks.append(_count("valid_lengths", invalid))
    if length_sweep is not None and length_sweep.worst_cliff_ratio is not None:
        cliff = _at_most("steadiness", length_sweep.worst_cliff_ratio, thresholds.max_cliff_ratio)
        detail = f"at {length_sweep.worst_cliff_prompt_tokens} prompt tokens"
        checks.append(cliff.model_copy(update={"detail": detail}))
    for in_runtime in endurance:
        checks += _of_endurance(in_runtime, thresholds)
    return GateVerdict(
        passed=all(check.passed for check in checks), checks=tuple(checks), notes=tuple(_notes(evaluation, checks))
    )


def _against_reference(evaluation: Evaluation, thresholds: GateThresholds) -> list[GateCheck]:
    if not evaluation.has_reference:
        return []
    vocabulary = evaluation.vocabulary
    if not vocabulary.comparable:
        detail = f"{vocabulary.variant} tokens, the reference {vocabulary.reference}"
        return [_count("vocabulary", [detail])]
    checks = [
        _at_least(
            "top1_agreement",
            evaluation.top1_agreement,
            thresholds.min_top1_agreement,
            evaluation.top1_agreement_interval,
        ),
        _at_most(
            "kl_divergence", evaluation.kl_divergence, thresholds.max_kl_divergence, evaluation.kl_divergence_interval
        ),
    ]
    if evaluation.quality_loss is not None:
        checks.append(_beyond_noise("quality_loss", evaluation.quality_loss, thresholds.max_quality_loss))
    return checks


def _of_answers(evaluation: Evaluation, thresholds: GateThresholds) -> list[GateCheck]:
    checks = [_at_least("finite_logits", evaluation.finite_logits, 1.0)]
    if not evaluation.has_reference:
        answered = 1 - evaluation.empty_answers / len(evaluation.rows)
        checks.append(_at_least("non_empty_answers", answered, 1.0))
    conformity = evaluation.output_conformity
    if conformity is not None:
        checks.append(_at_least("output_format", conformity.value, thresholds.min_output_conformity, conformity))
    return checks


def _on_text(text: TextComparison, thresholds: GateThresholds) -> list[GateCheck]:
    if text.reference_perplexity is None:
        return []
    top1, divergence = text.top1_agreement, text.kl_divergence
    agreement, distance = (None if estimate is None else estimate.value for estimate in (top1, divergence))
    return [
        _at_least("text_top1_agreement", agreement, thresholds.min_top1_agreement, top1),
        _at_most("text_kl_divergence", distance, thresholds.max_kl_divergence, divergence),
    ]


def _parity_faults(parity: TemplateParity) -> list[str]:
    mismatches = [f"{mismatch.runtime} renders {mismatch.conversation!r} differently" for mismatch in parity.mismatches]
    return mismatches + [f"{token} is not one token" for token in parity.broken_control_tokens]


def _of_endurance(endurance: Endurance, thresholds: GateThresholds) -> list[GateCheck]:
    names: tuple[CheckName, CheckName] = (
        ("memory_growth_genai", "edge_input_genai")
        if endurance.runtime == "genai"
        else ("memory_growth_foundry", "edge_input_foundry")
    )
    checks = [_count(names[1], [edge_input.name for edge_input in endurance.edge_inputs if not edge_input.handled])]
    if endurance.memory is not None:
        limit = thresholds.max_memory_growth_bytes_per_request
        checks.append(_beyond_noise(names[0], endurance.memory.bytes_per_request, limit))
    return checks


def _notes(evaluation: Evaluation, checks: Sequence[GateCheck]) -> Iterator[str]:
    if not evaluation.has_reference:
        yield "There is no source checkpoint to compare with: only checks of the variant alone were made."
    elif evaluation.quality_loss is None:
        yield "The evaluation rows have no expected answers: the task score was not judged."
    yield from evaluation.notes
    for check in checks:
        if not check.decided:
            yield (
                f"{check.name.replace('_', ' ')} is not decided: {check.value:,.5g}, between {check.low:,.5g} and "
                f"{check.high:,.5g}, where the threshold is {check.threshold:,.5g}. More rows or requests decide it."
            )
    mismatches = evaluation.template_mismatches.count
    if mismatches:
        share = f"{mismatches} of {len(evaluation.rows)} prompts"
        yield f"The runtime renders or tokenizes {share} differently from transformers."


def _at_least(name: CheckName, value: float | None, threshold: float, interval: Estimate | None = None) -> GateCheck:
    return _compared(name, value, "at least", threshold, interval)


def _at_most(name: CheckName, value: float | None, threshold: float, interval: Estimate | None = None) -> GateCheck:
    return _compared(name, value, "at most", threshold, interval)


def _compared(
    name: CheckName,
    value: float | None,
    bound: Literal["at least", "at most"],
    threshold: float,
    interval: Estimate | None,
) -> GateCheck:
    value = _finite(value)
    passed = value is not None and (value >= threshold if bound == "at least" else value <= threshold)
    limits = {} if interval is None else {"low": interval.low, "high": interval.high}
    return GateCheck(name=name, value=value, threshold=threshold, bound=bound, passed=passed, **limits)


def _beyond_noise(name: CheckName, figure: Estimate, threshold: float) -> GateCheck:
    """Fail only a figure whose whole interval lies above the threshold."""
    return GateCheck(
        name=name,
        value=_finite(figure.value),
        threshold=threshold,
        bound="at most",
        passed=figure.low <= threshold,
        low=figure.low,
        high=figure.high,
        decided=not figure.low <= threshold < figure.high,
    )


def _count(name: CheckName, faults: Sequence[str]) -> GateCheck:
    return GateCheck(
        name=name, value=len(faults), threshold=0, bound="at most", passed=not faults, detail="; ".join(faults)
    )


def _finite(value: float | None) -> float | None:
    """The value without rounding noise (1.0 - 0.98 is a little more than 0.02); None if it is not finite."""
    return round(value, 12) if value is not None and math.isfinite(value) else None


class VariantVerdict(GateVerdict):
    """The verdict on a variant of a version, and the thresholds."""

    precision: str
    thresholds: GateThresholds


VERDICT = Kind("verdict", VariantVerdict)


@stage("judge variant", run_name="judge-{variant.precision}")
def judge_stored_variant(
    variant: Variant,
    evaluated: Evaluation,
    thresholds: GateThresholds,
    *,
    length_sweep: LengthSweep | None,
    parity: TemplateParity | None,
    text: TextComparison | None,
    endurance: Sequence[Endurance],
) -> GateVerdict:
    """Judge a variant and append the verdict to the version's evidence."""
    verdict = judge(evaluated, thresholds, length_sweep=length_sweep, parity=parity, text=text, endurance=endurance)
    record = VariantVerdict(precision=variant.precision, thresholds=thresholds, **dict(verdict))
    variant.version.record(VERDICT, record)
    return verdict
