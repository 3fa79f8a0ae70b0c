"""History: what a version does better or worse than an earlier one of the same name, beyond noise."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from tasks.statistics import Estimate

Trend = Literal["better", "worse", "same"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Change(_Record):
    """One metric of one precision before and after.

    `change` is after over before for speed, memory and size (1: no change), after minus before for a task score.
    """

    precision: str
    metric: str
    before: FiniteFloat
    after: FiniteFloat
    change: Estimate
    trend: Trend


class History(_Record):
    """The comparison with one earlier version; `notes` say what could not be compared and why."""

    previous: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
