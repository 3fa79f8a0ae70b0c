"""Uncertainty: intervals of means, of paired differences and of ratios, each by a named method."""

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0  # the same figures have the same interval


class Estimate(BaseModel):
    """A figure with its interval at `CONFIDENCE`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


def mean_score(scores: Sequence[float]) -> Estimate:
    """Mean of at least one score between 0 and 1, with its percentile bootstrap interval (Efron 1979).

    Scores that are all 0 or all 1 leave the bootstrap nothing to resample; they get the exact binomial interval
    (Clopper and Pearson 1934), so that three right answers of three do not count as certainty.
    """
    values = np.asarray(scores, np.float64)
    mean = float(values.mean())
    if mean in (0.0, 1.0):
        interval = stats.binomtest(round(values.sum()), len(values)).proportion_ci(CONFIDENCE, "exact")
        return Estimate(value=mean, low=float(interval.low), high=float(interval.high))
    return weighted_mean(scores, [1.0] * len(scores))


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Weighted mean of at least one value, with a percentile bootstrap interval over the values.

    Each value is one cluster, such as an evaluation row with its mean over `weight` token positions: positions of one
    row are alike, so that rows are resampled, not positions.
    """
    numbers, sizes = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    drawn = np.random.default_rng(SEED).integers(0, len(numbers), (RESAMPLES, len(numbers)))
    means = (numbers * sizes)[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.average(numbers, weights=sizes))
    return Estimate(value=value, low=min(value, float(low)), high=max(value, float(high)))


def paired_loss(reference: Sequence[float], variant: Sequence[float]) -> Estimate:
    """Mean of reference minus variant over the same questions, scores between 0 and 1.

    The interval is that of Agresti and Min (2005, Simple improved confidence intervals for comparing matched
    proportions) at one-sided `CONFIDENCE` to either side, as non-inferiority is judged: two questions are added, half
    of one lost, half of one won and one alike, so that a few equal answers are not taken for proof of equality.
    """
    differences = np.asarray(reference, np.float64) - np.asarray(variant, np.float64)
    count = len(differences) + 2
    centre = float(differences.sum()) / count
    spread = (float((differences**2).sum()) + 1) / count - centre**2
    reach = float(stats.norm.ppf(CONFIDENCE)) * math.sqrt(spread / count)
    value = float(differences.mean())
    return Estimate(value=value, low=min(value, max(-1.0, centre - reach)), high=max(value, min(1.0, centre + reach)))


def ratio_of_medians(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Median of `after` over median of `before`, positive figures, with a percentile bootstrap interval over both."""
    random = np.random.default_rng(SEED)
    medians = []
    for figures in (before, after):
        numbers = np.asarray(figures, np.float64)
        medians.append(np.median(numbers[random.integers(0, len(numbers), (RESAMPLES, len(numbers)))], axis=1))
    low, high = np.quantile(medians[1] / medians[0], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.median(after) / np.median(before))
    return Estimate(value=value, low=min(value, float(low)), high=max(value, float(high)))


def slope(positions: Sequence[float], values: Sequence[float]) -> Estimate:
    """Slope of the least-squares line through at least three points, with its t interval."""
    fit = stats.linregress(positions, values)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(positions) - 2)) * float(fit.stderr)
    return Estimate(value=float(fit.slope), low=float(fit.slope) - reach, high=float(fit.slope) + reach)
