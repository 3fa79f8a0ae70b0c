import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmops.infra.reference.distributions import compare_position, kl_divergence, log_softmax

LOGITS = st.floats(-30, 30, width=32)


def pairs_of_logits():
    return st.integers(2, 40).flatmap(
        lambda size: st.tuples(*[arrays(np.float32, size, elements=LOGITS) for _ in range(2)])
    )


@given(pairs_of_logits())
def test_divergence_equals_the_definition(pair):
    reference, variant = (logits.astype(np.float64) for logits in pair)
    p = np.exp(reference) / np.exp(reference).sum()
    q = np.exp(variant) / np.exp(variant).sum()
    expected = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    assert kl_divergence(log_softmax(pair[0]), log_softmax(pair[1])) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(pairs_of_logits())
def test_divergence_is_zero_to_itself_and_never_negative(pair):
    reference, variant = map(log_softmax, pair)
    assert kl_divergence(reference, reference) == 0
    assert kl_divergence(reference, variant) >= 0


@given(arrays(np.float32, 8, elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_log_softmax_does_not_overflow(logits):
    values = log_softmax(logits)
    assert np.isfinite(values).all()
    assert np.exp(values).sum() == pytest.approx(1)


def test_a_divergence_known_by_hand():
    reference, variant = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    comparison = compare_position(reference, variant, next_token=1)
    assert comparison.kl_divergence == pytest.approx(0.25 * math.log(2))
    assert comparison.log_probability == pytest.approx(math.log(0.5))
    assert comparison.reference_log_probability == pytest.approx(math.log(0.25))
    assert comparison.finite
    assert not comparison.agrees


@pytest.mark.parametrize(
    ("chosen", "agrees", "nearly"), [(0, True, True), (1, False, True), (2, False, False)], ids=["same", "tie", "other"]
)
def test_another_first_choice_is_nearly_the_same_if_the_reference_hardly_prefers_its_own(chosen, agrees, nearly):
    variant = np.zeros(3)
    variant[chosen] = 1
    comparison = compare_position(np.array([2.0, 2.0 - 0.24, 2.0 - 0.26]), variant, next_token=0)
    assert (comparison.agrees, comparison.nearly_agrees) == (agrees, nearly)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_position_that_is_not_finite_is_a_disagreement_without_figures(value):
    comparison = compare_position(np.array([2.0, 1.0]), np.array([2.0, value]), next_token=0)
    assert (comparison.finite, comparison.agrees) == (False, False)
    assert comparison.kl_divergence is None
    assert comparison.log_probability is None
