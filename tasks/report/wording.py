"""Figures as text, with their units and intervals."""

import re
from collections.abc import Callable

from slmops.tasks.exams.estimates import CONFIDENCE, Estimate
from slmops.tasks.verdict.checks import GateCheck
from slmops.tasks.verdict.gate import GateVerdict

NOTHING = "-"
INTERVALS = f"In brackets: {CONFIDENCE:.0%} intervals."


def megabytes(size_bytes: float) -> str:
    """Return a size in MB (10^6 bytes)."""
    return f"{size_bytes / 1e6:,.1f} MB"


def decimal(value: float) -> str:
    """Return a figure such as milliseconds or tokens per second, with about three digits."""
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def ratio(value: float) -> str:
    """Return a figure without a unit, with three significant digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Return a share as a percentage."""
    return f"{value:.1%}"


def factor(value: float) -> str:
    """Return a ratio as a factor."""
    return f"{value:.2f}x"


def signed_percent(value: float) -> str:
    """Return a change of a share in points, or a ratio's distance from 1, with its sign."""
    return f"{round(value, 3) + 0:+.1%}"  # + 0 avoids a minus sign before zero


def bytes_per_request(value: float) -> str:
    """Return a growth in kB per request (10^3 bytes)."""
    return f"{round(value / 1e3, 1) + 0:,.1f} kB"  # + 0 avoids a minus sign before zero


def estimated(estimate: Estimate | None, wording: Callable[[float], str]) -> str:
    """Return a figure with its interval, in the same unit, in brackets."""
    if estimate is None:
        return NOTHING
    low, high = (re.sub(r"\D+$", "", wording(limit)) for limit in (estimate.low, estimate.high))
    return f"{wording(estimate.value)} ({low} to {high})"


def shown(value: float | None, wording: Callable[[float], str]) -> str:
    """Return a figure, or a dash if there is none."""
    return NOTHING if value is None else wording(value)


_WORDING: dict[str, Callable[[float], str]] = {
    "top1_agreement": percent,
    "text_top1_agreement": percent,
    "quality_loss": percent,
    "finite_logits": percent,
    "output_format": percent,
    "non_empty_answers": percent,
    "ended_answers": percent,
    "ended_thoughts": percent,
    "repetition": percent,
    "memory_growth_genai": bytes_per_request,
    "memory_growth_foundry": bytes_per_request,
    "steadiness": factor,
}


def check_value(check: GateCheck) -> str:
    """Return a check's figure, with its interval."""
    wording = _WORDING.get(check.name, ratio)
    if check.value is None:
        return "not finite"
    if check.low is None or check.high is None:
        return wording(check.value)
    return estimated(Estimate(value=check.value, low=check.low, high=check.high), wording)


def check_threshold(check: GateCheck) -> str:
    """Return a check's threshold."""
    return f"{check.bound} {_WORDING.get(check.name, ratio)(check.threshold)}"


def check_verdict(check: GateCheck) -> str:
    """Return a check's result; if its interval contains the threshold, it neither passed nor failed."""
    if not check.passed:
        return "allowed to fail" if check.allowed else "failed"
    return "passed" if check.decided else "not decided"


def in_spite_of(verdict: GateVerdict | None) -> str:
    """Return the sentence about the checks that failed and were allowed to fail."""
    failed = [
        f"{check.title} {check_value(check)}, {check_threshold(check)} is required"
        for check in (verdict.allowed_checks if verdict else ())
    ]
    return f"Registered although it failed, because that was allowed: {'; '.join(failed)}."
