"""Intervals: known values, agreement with scipy's own, and how often they hold the truth."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.tasks.exams.estimates import Estimate, mean_score, paired_loss, ratio_of_medians, slope, weighted_mean

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(3, 3, 0.2924, 1.0), (0, 3, 0.0, 0.7076), (20, 20, 0.8316, 1.0), (1, 1, 0.025, 1.0), (0, 100, 0.0, 0.0362)],
)
def test_scores_that_are_all_right_or_all_wrong_have_the_exact_binomial_interval(
    right: int, count: int, low: float, high: float
) -> None:
    found = mean_score([1.0] * right + [0.0] * (count - right))
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (right / count, low, high)


def test_scores_that_are_all_alike_are_not_certain() -> None:
    once, often = mean_score([0.5]), mean_score([0.5] * 200)
    assert once.low < 0.1 < 0.9 < once.high
    assert 0.42 < often.low < 0.5 < often.high < 0.58
    assert (once.value, often.value) == (0.5, 0.5)


@given(SCORES)
def test_a_mean_is_in_its_interval_and_equal_scores_have_equal_intervals(scores: list[float]) -> None:
    found = mean_score(scores)
    assert found.value == pytest.approx(np.mean(scores))
    assert -1e-12 <= found.low <= found.value <= found.high <= 1 + 1e-12
    assert mean_score(scores) == found


def test_the_interval_of_a_mean_is_that_of_scipys_percentile_bootstrap() -> None:
    from scipy import stats  # takes half a second to import

    scores = np.random.default_rng(1).beta(2, 1, 60)
    own = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    found = mean_score(list(scores))
    assert (found.low, found.high) == pytest.approx((own.low, own.high), abs=0.01)


def test_rows_weigh_as_many_positions_as_they_have() -> None:
    assert weighted_mean([1.0, 0.0], [3, 1]).value == 0.75
    whole, halves = weighted_mean([1.0, 0.0, 1.0], [4, 4, 4]), weighted_mean([1.0, 0.0, 1.0], [1, 1, 1])
    assert whole == halves
    # Positions of one row are alike: ten rows of hundred positions are ten observations, not a thousand.
    found = weighted_mean([1.0] * 5 + [0.0] * 5, [100] * 10)
    assert found.high - found.low > 0.5


def test_an_interval_over_many_rows_takes_little_memory() -> None:
    scores = list(np.random.default_rng(0).random(20_000))
    tracemalloc.start()
    found = mean_score(scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000  # all resamples at once would be 20,000 x 2,000 indices: 320 MB
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.std(scores) / math.sqrt(20_000), rel=0.1)


def test_a_paired_loss_has_agresti_and_mins_interval() -> None:
    # Agresti and Min 2005, section 2: with 8, 16, 3 and 3 pairs of 30 and half a pair more in each cell, by hand.
    reference = [1.0] * 8 + [1.0] * 16 + [0.0] * 3 + [0.0] * 3
    variant = [1.0] * 8 + [0.0] * 16 + [1.0] * 3 + [0.0] * 3
    lost, won, pairs = 16.5, 3.5, 32
    centre = (lost - won) / pairs
    reach = 1.6449 * math.sqrt((lost + won) - (lost - won) ** 2 / pairs) / pairs
    found = paired_loss(reference, variant)
    assert found.value == pytest.approx(13 / 30)
    assert (found.low, found.high) == pytest.approx((centre - reach, centre + reach), abs=1e-4)


def test_a_few_equal_answers_prove_no_equality() -> None:
    few, many = paired_loss([1.0] * 4, [1.0] * 4), paired_loss([1.0] * 400, [1.0] * 400)
    assert few.value == many.value == 0
    assert few.high > 0.2
    assert many.high < 0.01


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_a_loss_is_in_its_interval_and_changes_sign_with_its_sides(pairs: list[tuple[float, float]]) -> None:
    reference, variant = zip(*pairs, strict=True)
    found, turned = paired_loss(reference, variant), paired_loss(variant, reference)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low))


@pytest.mark.parametrize(
    ("count", "lost", "won"), [(10, 0.05, 0.05), (20, 0.2, 0.1), (100, 0.05, 0.0), (100, 0.1, 0.1)]
)
def test_each_bound_of_a_loss_errs_about_as_seldom_as_it_promises(count: int, lost: float, won: float) -> None:
    random = np.random.default_rng(3)
    differences = random.choice([1.0, -1.0, 0.0], (2000, count), p=[lost, won, 1 - lost - won])
    found = [paired_loss(np.maximum(line, 0).tolist(), np.maximum(-line, 0).tolist()) for line in differences]
    assert np.mean([estimate.low > lost - won for estimate in found]) < 0.07  # the bound that rejects a variant
    # Where nothing is ever won, few losses put the upper bound a little low: 0.11 at 5 of 100.
    assert np.mean([estimate.high < lost - won for estimate in found]) < (0.07 if won else 0.12)


def test_a_ratio_of_medians_has_an_interval_around_it() -> None:
    random = np.random.default_rng(4)
    before, after = random.normal(100, 5, 40), random.normal(150, 5, 40)
    found = ratio_of_medians(list(before), list(after))
    assert found.value == np.median(after) / np.median(before)
    assert 1.4 < found.low < 1.5 < found.high < 1.6
    assert ratio_of_medians([2.0], [3.0]) == Estimate(value=1.5, low=1.5, high=1.5)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8, 21, 60])
def test_a_slope_and_its_interval_are_those_of_scipys_regression_and_t(count: int) -> None:
    from scipy import stats

    positions = list(range(count))
    values = list(np.random.default_rng(count).normal(size=count))
    fit = stats.linregress(positions, values)
    reach = float(stats.t.ppf(0.975, count - 2)) * float(fit.stderr)
    found = slope(positions, values)
    expected = (fit.slope, fit.slope - reach, fit.slope + reach)
    assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-9)


def test_a_slope_has_its_t_interval() -> None:
    positions = [0.0, 1.0, 2.0, 3.0, 4.0]
    exact = slope(positions, [5 + 3 * position for position in positions])
    assert (exact.value, exact.low, exact.high) == pytest.approx((3, 3, 3))
    noisy = slope(positions, [0.0, 1.5, 1.5, 3.5, 4.0])
    # By hand: residuals -0.1, 0.4, -0.6, 0.4, -0.1, so a standard error of sqrt(0.7 / 3 / 10), and t of 3.18245.
    assert noisy.value == pytest.approx(1.0)
    assert noisy.high - noisy.low == pytest.approx(2 * 3.18245 * math.sqrt(0.7 / 3 / 10), rel=1e-4)
