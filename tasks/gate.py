"""The gate: whether a variant may be served, decided from what was measured of it."""

import math
from typing import Annotated, Any, Literal

from prefect import task
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from infra.errors import BadInput
from infra.settings import GateSettings
from infra.storage.registry import Manifest, ModelRegistry, StoredVariant
from tasks.evaluate import Evaluation, Share


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GateThresholds(_Record):
    """What a variant must reach: shares, and nats per token."""

    min_top1_agreement: Share
    max_kl_divergence: Annotated[FiniteFloat, Field(ge=0)]
    max_quality_loss: Share


def _thresholds(top1: float, kl: float, loss: float) -> GateThresholds:
    return GateThresholds(min_top1_agreement=top1, max_kl_divergence=kl, max_quality_loss=loss)


# DESIGN.md, section 8. fp32 is held to what fp16 is.
DEFAULT_THRESHOLDS = {
    "fp32": _thresholds(0.99, 0.005, 0.02),
    "fp16": _thresholds(0.99, 0.005, 0.02),
    "int8": _thresholds(0.97, 0.02, 0.02),
    "int4": _thresholds(0.90, 0.10, 0.05),
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
        raise BadInput(f"There are no gate thresholds for the precision {precision!r}.", f"Use one of {known}.")
    parameters = {
        "min_top1_agreement": min_top1_agreement,
        "max_kl_divergence": max_kl_divergence,
        "max_quality_loss": max_quality_loss,
    }
    values = DEFAULT_THRESHOLDS[precision].model_dump()
    for name, parameter in parameters.items():
        setting: float | None = getattr(settings, name)
        values[name] = next(value for value in (parameter, setting, values[name]) if value is not None)
    try:
        return GateThresholds(**values)
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}" for fault in error.errors())
        raise BadInput(f"Gate thresholds are not valid: {faults}.", "Correct them.") from None


class GateCheck(_Record):
    """One comparison with a threshold; `value` is None when there is no finite figure, and then it did not pass."""

    name: Literal["top1_agreement", "kl_divergence", "quality_loss", "finite_logits", "non_empty_answers"]
    value: FiniteFloat | None
    threshold: FiniteFloat
    passed: bool


class GateVerdict(_Record):
    """The gate's decision: passed when every check passed. `notes` say what could not be judged, or what stands out."""

    passed: bool
    checks: tuple[GateCheck, ...]
    notes: tuple[str, ...] = ()


def judge(evaluation: Evaluation, thresholds: GateThresholds) -> GateVerdict:
    """Decide whether a variant may be registered.

    With a reference: `top1_agreement` (at least), `kl_divergence` (at most), `quality_loss` (at most: the reference's
    share of exact matches minus the variant's; only with expected answers) and `finite_logits` (all). Without one:
    `finite_logits` and `non_empty_answers` (all), and a note that says so.
    """
    checks = []
    notes = []
    if evaluation.has_reference:
        checks.append(_at_least("top1_agreement", evaluation.top1_agreement, thresholds.min_top1_agreement))
        checks.append(_at_most("kl_divergence", evaluation.kl_divergence, thresholds.max_kl_divergence))
        if evaluation.exact_match is not None and evaluation.reference_exact_match is not None:
            loss = evaluation.reference_exact_match - evaluation.exact_match
            checks.append(_at_most("quality_loss", loss, thresholds.max_quality_loss))
        else:
            notes.append("The evaluation rows have no expected answers: only the distributions were judged.")
    else:
        answered = 1 - evaluation.empty_answers / len(evaluation.rows)
        checks.append(_at_least("non_empty_answers", answered, 1.0))
        notes.append(
            "There is no source checkpoint to compare with: "
            "only finite logits and answers that are not empty were checked."
        )
    checks.append(_at_least("finite_logits", evaluation.finite_logits, 1.0))
    mismatches = evaluation.template_mismatches.count
    if mismatches:
        share = f"{mismatches} of {len(evaluation.rows)} prompts"
        notes.append(f"The runtime renders or tokenizes {share} otherwise than transformers.")
    return GateVerdict(passed=all(check.passed for check in checks), checks=tuple(checks), notes=tuple(notes))


def _at_least(name: Any, value: float | None, threshold: float) -> GateCheck:
    value = _finite(value)
    return GateCheck(name=name, value=value, threshold=threshold, passed=value is not None and value >= threshold)


def _at_most(name: Any, value: float | None, threshold: float) -> GateCheck:
    value = _finite(value)
    return GateCheck(name=name, value=value, threshold=threshold, passed=value is not None and value <= threshold)


def _finite(value: float | None) -> float | None:
    """The value without the last bits' noise (1.0 - 0.98 is a little more than 0.02); None when it is not finite."""
    return round(value, 12) if value is not None and math.isfinite(value) else None


@task(name="judge variant", task_run_name="judge-{variant.precision}", tags=["slmops", "evaluate"])
def judge_stored_variant(
    manifest: Manifest,
    variant: StoredVariant,
    evaluated: Evaluation,
    thresholds: GateThresholds,
    registry: ModelRegistry,
) -> GateVerdict:
    """Judge a variant and append the verdict to the version's evidence."""
    verdict = judge(evaluated, thresholds)
    record = {"precision": variant.precision, "thresholds": thresholds.model_dump(), **verdict.model_dump(mode="json")}
    registry.add_evidence(manifest, "verdict", record)
    return verdict
