"""Uncertainty: intervals of means, of paired differences and of ratios, each by a named method.

`scipy.special` gives the quantiles and is imported inside functions: `scipy.stats` takes a second to load.
"""

import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat

from slmops.infra.records import Record

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0  # a fixed seed, so that equal figures have equal intervals
# Limit on the indices that are drawn at once: 8 MB.
DRAWN_AT_ONCE = 2**20
DRIFT_BLOCKS = 8
WANDERING_CORRELATION = 0.25


class Estimate(Record):
    """A figure with its interval at `CONFIDENCE`."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


def mean_score(scores: Sequence[float]) -> Estimate:
    """Mean of at least one score between 0 and 1, with its percentile bootstrap interval (Efron 1979).

    If all scores are equal, the bootstrap has no variance. They get the exact binomial interval (Clopper and Pearson
    1934) for as many correct answers as their sum, so that three correct answers out of three do not count as
    certainty. No distribution of scores between 0 and 1 with that mean varies more than right and wrong answers.
    """
    values = np.asarray(scores, np.float64)
    if values.min() < values.max():
        return weighted_mean(scores, [1.0] * len(scores))
    from scipy import special

    mean, right, wrong = float(values[0]), float(values.sum()), float((1 - values).sum())
    low = float(special.betaincinv(right, wrong + 1, (1 - CONFIDENCE) / 2)) if right > 0 else 0.0
    high = float(special.betaincinv(right + 1, wrong, (1 + CONFIDENCE) / 2)) if wrong > 0 else 1.0
    return Estimate(value=mean, low=min(mean, low), high=max(mean, high))


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Weighted mean of at least one value, with a percentile bootstrap interval over the values.

    Each value is one cluster, such as an evaluation row with its mean over `weight` token positions: positions of one
    row are not independent, so rows are resampled, not positions.
    """
    numbers, sizes = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    sums = numbers * sizes
    random = np.random.default_rng(SEED)
    means = [sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1) for drawn in _resamples(random, len(numbers))]
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.average(numbers, weights=sizes))
    return Estimate(value=value, low=min(value, float(low)), high=max(value, float(high)))


def _resamples(random: np.random.Generator, count: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices of `RESAMPLES` samples of `count` with replacement, one sample a line."""
    lines = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, RESAMPLES, lines):
        yield random.integers(0, count, (min(lines, RESAMPLES - start), count))


def paired_loss(reference: Sequence[float], variant: Sequence[float]) -> Estimate:
    """Mean of reference minus variant over the same questions, scores between 0 and 1.

    The interval is that of Agresti and Min (2005, Simple improved confidence intervals for comparing matched
    proportions) at one-sided `CONFIDENCE` to either side, as in tests of non-inferiority. It adds two pseudo-questions,
    one with equal scores and one half lost, half won, so that a few equal answers do not count as proof of equality.
    """
    differences = np.asarray(reference, np.float64) - np.asarray(variant, np.float64)
    count = len(differences) + 2
    centre = float(differences.sum()) / count
    spread = (float((differences**2).sum()) + 1) / count - centre**2
    reach = statistics.NormalDist().inv_cdf(CONFIDENCE) * math.sqrt(spread / count)
    value = float(differences.mean())
    return Estimate(value=value, low=min(value, max(-1.0, centre - reach)), high=max(value, min(1.0, centre + reach)))


def ratio_of_medians(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Median of `after` over median of `before`, positive figures, with a percentile bootstrap interval over both."""
    random = np.random.default_rng(SEED)
    medians = []
    for figures in (before, after):
        numbers = np.asarray(figures, np.float64)
        drawn_medians = [np.median(numbers[drawn], axis=1) for drawn in _resamples(random, len(numbers))]
        medians.append(np.concatenate(drawn_medians))
    low, high = np.quantile(medians[1] / medians[0], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.median(after) / np.median(before))
    return Estimate(value=value, low=min(value, float(low)), high=max(value, float(high)))


def slope(positions: Sequence[float], values: Sequence[float]) -> Estimate:
    """Slope of the least-squares line through at least three points, with its t interval."""
    across = np.asarray(positions, np.float64) - np.mean(positions)
    up = np.asarray(values, np.float64) - np.mean(values)
    freedom = len(across) - 2
    value = float(across @ up / (across @ across))
    error = math.sqrt(float(((up - value * across) ** 2).sum() / freedom / (across @ across)))
    reach = _student_reach(freedom) * error
    return Estimate(value=value, low=value - reach, high=value + reach)


def drift(values: Sequence[float]) -> Estimate:
    """Growth per step of a series with steps and temporary peaks, such as memory; needs 8 values.

    The mean change between the lowest values of `DRIFT_BLOCKS` successive blocks of equal size (the first values are
    left out if the number is not divisible), with its t interval: batch means (Schmeiser 1982, Batch size effects in
    the analysis of simulation output), of minima because peaks are temporary. The interval is widened for the
    correlation of 1/4 that successive changes of a random walk have (Working 1960, Note on the
    correlation of first differences of averages in a random chain).

    The slope of a line would show significant growth for a single step in an otherwise flat series. Here only growth
    that continues from block to block counts.
    """
    size = len(values) // DRIFT_BLOCKS
    floors = np.asarray(values[-size * DRIFT_BLOCKS :], np.float64).reshape(DRIFT_BLOCKS, size).min(axis=1)
    changes = np.diff(floors) / size
    count = len(changes)
    value = float(changes.mean())
    doubled = 2 * WANDERING_CORRELATION / count
    widening = math.sqrt((1 + doubled * (count - 1)) / (1 - doubled))
    reach = widening * _student_reach(count - 1) * float(changes.std(ddof=1)) / math.sqrt(count)
    return Estimate(value=value, low=value - reach, high=value + reach)


def _student_reach(freedom: int) -> float:
    """Return the t for which `CONFIDENCE` of Student's distribution is between -t and t."""
    from scipy import special

    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))
