"""The gate's checks: their names, their record, and those that a user may allow to fail."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import FiniteFloat

from slmops.infra.errors import BadInput
from slmops.infra.records import Record, later_field
from slmops.tasks.exams.estimates import Estimate

CheckName = Literal[
    "vocabulary",
    "finite_logits",
    "top1_agreement",
    "kl_divergence",
    "quality_loss",
    "ended_answers",
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
    "ended_thoughts",
    "repetition",
    "tool_calls_lost",
    "tool_calls_invented",
    "tool_arguments_changed",
]
# A model that fails one of these gives no meaningful answers.
NEVER_ALLOWED: tuple[CheckName, ...] = ("vocabulary", "finite_logits")
Bound = Literal["at least", "at most"]


class GateCheck(Record):
    """One comparison with a threshold; `value` is None without a finite figure, and the check fails then.

    `low` and `high` are the bounds of the figure's interval, if it has one. `decided` is false if that interval
    contains the threshold, or if only near ties miss it: the check neither passed nor failed, and does not prevent a
    variant from passing. `allowed`
    is true if the check failed and the user allowed it. `thinking` says of which rows the figure is, if a model was
    evaluated with thoughts (true) and without; None: of all.
    """

    name: CheckName
    value: FiniteFloat | None
    threshold: FiniteFloat
    bound: Bound
    passed: bool
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    decided: bool = True
    allowed: bool = later_field(False)
    detail: str = ""
    thinking: bool | None = later_field(None)

    @property
    def title(self) -> str:
        """Its name in words, with the mode of its rows."""
        mode = "" if self.thinking is None else " with thoughts" if self.thinking else " without thoughts"
        return self.name.replace("_", " ") + mode

    @property
    def rejects(self) -> bool:
        """Whether it prevents the variant from being served."""
        return not self.passed and not self.allowed


def check_allowed(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of checks that may fail, each once.

    Raises `BadInput` for an unknown name, and for a check that may not be allowed to fail.
    """
    allowable = [name for name in get_args(CheckName) if name not in NEVER_ALLOWED]
    for name in names:
        if name in allowable:
            continue
        fault = "cannot be allowed to fail" if name in NEVER_ALLOWED else "is unknown"
        raise BadInput(
            f"The check {name!r} {fault}.", f"Allow one of {', '.join(allowable)}.", code="check-not-allowable"
        )
    return tuple(dict.fromkeys(names))


def at_least(name: CheckName, value: float | None, threshold: float, interval: Estimate | None = None) -> GateCheck:
    """Compare a figure with the smallest value that passes."""
    return _compared(name, value, "at least", threshold, interval)


def at_most(name: CheckName, value: float | None, threshold: float, interval: Estimate | None = None) -> GateCheck:
    """Compare a figure with the largest value that passes."""
    return _compared(name, value, "at most", threshold, interval)


def beyond_noise(name: CheckName, figure: Estimate, threshold: float) -> GateCheck:
    """Fail only a figure whose whole interval is above the threshold."""
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


def at_least_beyond_noise(
    name: CheckName, value: float | None, threshold: float, interval: Estimate | None
) -> GateCheck:
    """Fail only a share whose whole interval lies below the threshold; without an interval, the share itself."""
    check = at_least(name, value, threshold, interval)
    if check.value is None or interval is None or not interval.low < threshold <= interval.high:
        return check
    return check.model_copy(update={"passed": True, "decided": False})


def beside_near_ties(strict: GateCheck, near: GateCheck) -> GateCheck:
    """Return the check of an agreement; if `near`, which counts near ties as agreement, passes, it does not fail."""
    if strict.passed or near.value is None or not near.passed:
        return strict
    detail = f"{near.value:.3g} if near ties count as agreement"
    return strict.model_copy(update={"passed": True, "decided": False, "detail": detail})


def no_fault(name: CheckName, faults: Sequence[str]) -> GateCheck:
    """Pass if there is no fault."""
    return GateCheck(
        name=name, value=len(faults), threshold=0, bound="at most", passed=not faults, detail="; ".join(faults)
    )


def _compared(
    name: CheckName, value: float | None, bound: Bound, threshold: float, interval: Estimate | None
) -> GateCheck:
    value = _finite(value)
    passed = value is not None and (value >= threshold if bound == "at least" else value <= threshold)
    limits = {} if interval is None else {"low": interval.low, "high": interval.high}
    return GateCheck(name=name, value=value, threshold=threshold, bound=bound, passed=passed, **limits)


def _finite(value: float | None) -> float | None:
    """The value without rounding noise (1.0 - 0.98 is a little more than 0.02); None if it is not finite."""
    return round(value, 12) if value is not None and math.isfinite(value) else None
