"""The gate's thresholds: the defaults of each precision, overridden by a run's settings."""

from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from slmops.infra.errors import BadInput
from slmops.infra.records import Record, later_field
from slmops.infra.reference.answers import Share
from slmops.infra.settings import GateSettings

Divergence = Annotated[FiniteFloat, Field(ge=0)]


class GateThresholds(Record):
    """Thresholds for a variant: shares, nats per token, bytes per request, and a factor.

    `max_unended_answers` is the share of answers that may continue without an end if those of the source end; it also
    limits endless thoughts, and answers in a loop.

    The `broken_*` limits replace those of the distributions if the task score decides; None: they do not.
    With `source_excuses_output`, an answer without the output format is no fault if the source's answer to the same row
    lacks it too.
    """

    min_top1_agreement: Share
    max_kl_divergence: Divergence
    max_quality_loss: Share
    min_output_conformity: Share
    max_memory_growth_bytes_per_request: Annotated[int, Field(ge=0)]
    max_cliff_ratio: Annotated[FiniteFloat, Field(gt=1)]
    broken_top1_agreement: Share | None = later_field(None)
    broken_kl_divergence: Divergence | None = later_field(None)
    source_excuses_output: bool = later_field(False)
    max_unended_answers: Share = later_field(0.05)

    @property
    def where_the_score_decides(self) -> "GateThresholds":
        """The thresholds with limits of the distributions that only a broken model misses."""
        limits = {"min_top1_agreement": self.broken_top1_agreement, "max_kl_divergence": self.broken_kl_divergence}
        return self.model_copy(update={name: limit for name, limit in limits.items() if limit is not None})


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
# Between the sound and the broken variants of a real model: docs/evaluation.md has the figures, and
# `python -m tests.benchmarks.gate_limits` measures them. They replace the defaults above, but not a limit that the user
# set.
BROKEN_LIMITS = {
    "min_top1_agreement": {"broken_top1_agreement": 0.58},
    "max_kl_divergence": {"broken_kl_divergence": 0.85},
}
MIN_OUTPUT_CONFORMITY = 0.95


def thresholds_for(precision: str, settings: GateSettings) -> GateThresholds:
    """The precision's thresholds; a limit of the settings overrides the default of every precision.

    A limit that the user set always applies, whether or not the task score decides. The limits that a run's parameters
    name are in its settings (`slmops.tasks.request.gate_limits`). Raises `BadInput` for an unknown precision.
    """
    if precision not in DEFAULT_THRESHOLDS:
        known = ", ".join(DEFAULT_THRESHOLDS)
        raise BadInput(
            f"There are no gate thresholds for the precision {precision!r}.",
            f"Use one of {known}.",
            code="gate-precision-unknown",
        )
    conformity = settings.min_output_conformity
    values: dict[str, Any] = {
        "min_output_conformity": MIN_OUTPUT_CONFORMITY if conformity is None else conformity,
        "source_excuses_output": conformity is None,
        "max_memory_growth_bytes_per_request": settings.max_memory_growth_bytes_per_request,
        "max_cliff_ratio": settings.max_cliff_ratio,
    }
    for name, default in DEFAULT_THRESHOLDS[precision].items():
        named = getattr(settings, name)
        values[name] = default if named is None else named
        values |= BROKEN_LIMITS.get(name, {}) if named is None else {}
    return GateThresholds(**values)
