import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slmops.tasks.exams.length_sweep import length_sweep_of
from tests.support.measurements import make_measurement, swept_row

LENGTHS = (32, 64, 128, 256, 512)


def measured(rows, notes=()):
    return make_measurement(sweep=rows, sweep_notes=list(notes))


def test_medians_by_length_and_the_sweep_s_notes():
    rows = [swept_row(64, ttft, tps) for ttft, tps in ((9.0, 50.0), (5.0, 70.0), (6.0, 60.0))] + [swept_row(32, 2.0)]
    found = length_sweep_of(measured(rows, ["stopped"]))
    assert [
        (length.prompt_tokens, length.ttft_ms, length.token_generation_throughput_tps) for length in found.lengths
    ] == [
        (32, 2.0, 100.0),
        (64, 6.0, 60.0),
    ]
    assert found.notes == ("stopped",)
    assert found.ttft_scaling_exponent is None  # one length from 64 on has no slope


@given(st.floats(0.2, 2.5), st.floats(0.01, 100.0))
def test_the_scaling_exponent_is_found_whatever_the_unit(exponent, unit):
    found = length_sweep_of(measured([swept_row(length, unit * length**exponent) for length in LENGTHS]))
    estimate = found.ttft_scaling_exponent
    assert estimate.value == pytest.approx(exponent, abs=1e-6)
    assert estimate.low - 1e-6 <= exponent <= estimate.high + 1e-6


def test_the_fixed_cost_of_short_prompts_is_no_part_of_the_exponent():
    rows = [swept_row(length, float(length)) for length in LENGTHS[1:]] + [swept_row(32, 64.0)]
    assert length_sweep_of(measured(rows)).ttft_scaling_exponent.value == pytest.approx(1.0)


def test_noise_widens_the_exponent_s_interval():
    noisy = [
        swept_row(length, length * factor) for length, factor in zip(LENGTHS, (1, 1.3, 0.8, 1.2, 0.9), strict=True)
    ]
    estimate = length_sweep_of(measured(noisy)).ttft_scaling_exponent
    assert estimate.high - estimate.low > 0.5


def test_a_cliff_in_prompt_processing_is_named_with_its_length():
    rows = [swept_row(length, length * (6.0 if length >= 256 else 1.0)) for length in LENGTHS]
    found = length_sweep_of(measured(rows))
    assert (found.worst_cliff_ratio, found.worst_cliff_prompt_tokens) == (pytest.approx(6.0), 256)


def test_a_cliff_in_generation_is_named_with_its_length():
    rows = [swept_row(length, float(length), 20.0 if length == 512 else 100.0) for length in LENGTHS]
    found = length_sweep_of(measured(rows))
    assert (found.worst_cliff_ratio, found.worst_cliff_prompt_tokens) == (pytest.approx(5.0), 512)


def test_a_hiccup_that_was_measured_again_is_no_cliff():
    rows = [swept_row(length, float(length)) for length in LENGTHS]
    rows[2] = swept_row(128, 5000.0)
    assert length_sweep_of(measured(rows)).worst_cliff_ratio > 30
    rows += [swept_row(64, 64.0, round=1), swept_row(128, 128.0, round=1)]
    assert length_sweep_of(measured(rows)).worst_cliff_ratio == pytest.approx(1.0)


@given(st.lists(st.tuples(st.sampled_from(LENGTHS), st.floats(0.1, 1e4), st.floats(0.1, 1e4)), min_size=2))
def test_any_sweep_is_described(rows):
    assume(len({length for length, _, _ in rows}) > 1)
    found = length_sweep_of(measured([swept_row(*row) for row in rows]))
    assert math.isfinite(found.worst_cliff_ratio)
    assert found.worst_cliff_prompt_tokens in {length.prompt_tokens for length in found.lengths[1:]}


@pytest.mark.parametrize("fault", [{"finite_logits": False}, {"answered": False}])
def test_one_bad_answer_makes_its_length_invalid(fault):
    rows = [swept_row(length, float(length)) for length in LENGTHS for _ in range(3)]
    rows[4] = swept_row(64, 64.0, **fault)
    found = length_sweep_of(measured(rows))
    assert found.invalid_prompt_tokens == (64,)


def test_a_prompt_that_was_no_chat_needs_no_answer():
    assert length_sweep_of(measured([swept_row(32, 1.0, answered=None)])).invalid_prompt_tokens == ()


def test_a_measurement_without_a_sweep_has_nothing_to_say():
    found = length_sweep_of(make_measurement())
    assert found.lengths == ()
    assert found.worst_cliff_ratio is None
    assert found.worst_cliff_prompt_tokens is None
    assert found.ttft_scaling_exponent is None


def test_a_length_at_which_the_source_gives_no_text_either_is_reported_and_valid():
    rows = [swept_row(32, 2.0), swept_row(64, 4.0, answered=False), swept_row(128, 8.0, answered=False)]
    assert length_sweep_of(measured(rows)).invalid_prompt_tokens == (64, 128)
    found = length_sweep_of(measured(rows), {64})
    assert found.invalid_prompt_tokens == (128,)
    assert found.notes == ("At 64 prompt tokens it gives no text for the sweep's chat, like the source checkpoint.",)
    broken = [swept_row(64, 4.0, answered=False, finite_logits=False)]
    assert length_sweep_of(measured(broken), {64}).invalid_prompt_tokens == (64,)
