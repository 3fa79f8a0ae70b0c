from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.genai.sweep import (
    LengthSpeed,
    SweepPlan,
    TimedRequest,
    speed_by_length,
    sweep,
    sweep_lengths,
    throughput_losses,
)


@given(st.integers(1, 300_000), st.integers(2, 64), st.none() | st.integers(32, 300_000))
def test_lengths_are_powers_of_two_and_the_longest_that_fits(context, new_tokens, limit):
    lengths = sweep_lengths(context, new_tokens, limit)
    longest = min(context - new_tokens, limit or context)
    if longest < 1:
        assert lengths == []
        return
    assert lengths[-1] == longest
    assert lengths[:-1] == [2**power for power in range(5, 30) if 2**power < longest]


def test_the_demo_s_context_gives_these_lengths():
    assert sweep_lengths(1024, 8, None) == [32, 64, 128, 256, 512, 1016]
    assert sweep_lengths(1024, 8, 256) == [32, 64, 128, 256]
    assert sweep_lengths(24, 8, None) == [16]


class Machine:
    """Requests with made-up speeds: TTFT in ms by prompt length and by how often the length was asked for."""

    def __init__(self, ttft_ms, tps=lambda length, turn: 100.0):
        self.ttft_ms, self.tps = ttft_ms, tps
        self.asked = []

    def request(self, length):
        turn = self.asked.count(length)
        self.asked.append(length)
        ttft_ms, tps = self.ttft_ms(length, turn), self.tps(length, turn)
        return TimedRequest(
            new_tokens=8,
            ttft_ms=ttft_ms,
            token_generation_throughput_tps=tps,
            e2e_latency_ms=ttft_ms + 7000 / tps,
            finite_logits=True,
            answered=None,
        )

    def run(self, *, budget_s=1000.0, has_room=lambda length: True, first_s=0.01):
        plan = SweepPlan(
            lengths=(32, 64, 128, 256, 512), repetitions=3, budget_s=budget_s, max_cliff_ratio=4.0, first_s=first_s
        )
        return sweep(plan, self.request, has_room, lambda what: None)


def test_a_steady_machine_is_measured_once_per_length():
    machine = Machine(lambda length, turn: float(length))
    rows, notes = machine.run()
    assert machine.asked == [length for length in (32, 64, 128, 256, 512) for _ in range(3)]
    assert [row.repetition for row in rows] == [0, 1, 2] * 5
    assert {row.round for row in rows} == {0}
    assert notes == []


def test_a_hiccup_is_measured_again_and_forgotten():
    # Everything at 128 tokens takes ten times as long, but only the first three times.
    machine = Machine(lambda length, turn: length * (10.0 if length == 128 and turn < 3 else 1.0))
    rows, notes = machine.run()
    assert [row.prompt_tokens for row in rows if row.round == 1] == [64] * 3 + [128] * 3
    assert {row.round for row in rows} == {0, 1}
    assert max(loss.factor for loss in throughput_losses(speed_by_length(rows))) == pytest.approx(1.0)
    assert notes == [
        "Throughput fell by a factor of 10.0 from 64 to 128 prompt tokens; both were measured again: it is gone."
    ]


@pytest.mark.parametrize("which", ["prompt", "generation"])
def test_a_cliff_shows_in_every_round_and_stays(which):
    if which == "prompt":
        machine = Machine(lambda length, turn: length * (10.0 if length >= 256 else 1.0))
    else:
        machine = Machine(lambda length, turn: float(length), lambda length, turn: 10.0 if length >= 256 else 100.0)
    rows, notes = machine.run()
    assert [row.round for row in rows if row.prompt_tokens == 256] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row.round for row in rows if row.prompt_tokens == 512] == [0, 0, 0]
    worst = max(throughput_losses(speed_by_length(rows)), key=lambda loss: loss.factor)
    assert (worst.shorter, worst.longer, worst.factor) == (128, 256, pytest.approx(10.0))
    assert len(notes) == 2
    assert all("still there" in note for note in notes)


def test_the_sweep_stops_before_the_length_that_its_budget_does_not_have():
    # Quadratic: 3 requests take 0.96 s, 3.84 s and 15.4 s at 128, 256 and 512 tokens; by the second the growth is seen.
    machine = Machine(lambda length, turn: 0.02 * length**2, lambda length, turn: 1e9)
    rows, notes = machine.run(budget_s=12.0)
    assert max(row.prompt_tokens for row in rows) == 256
    (note,) = notes
    assert note.startswith("The sweep stopped before 512 prompt tokens: their 3 requests would take about 16 s")


def test_a_slow_model_is_not_swept_at_all():
    rows, notes = Machine(lambda length, turn: 1.0).run(first_s=500.0, budget_s=20.0)
    assert rows == []
    assert "stopped before 32 prompt tokens" in notes[0]


def test_the_sweep_stops_before_the_memory_ends():
    rows, notes = Machine(lambda length, turn: 1.0).run(has_room=lambda length: length < 128)
    assert {row.prompt_tokens for row in rows} == {32, 64}
    assert notes == ["The sweep stopped before 128 prompt tokens: the memory might not be sufficient."]


# What people wait for, and not faster than they read.
SPEEDS = st.lists(st.tuples(st.integers(1, 10_000), st.floats(101, 1e6), st.floats(0.1, 99)), min_size=2, max_size=6)


@given(SPEEDS)
def test_losses_do_not_depend_on_the_unit_of_time(found):
    lengths = {length: (ttft, tps) for length, ttft, tps in found}
    speeds = [LengthSpeed(length, *lengths[length]) for length in sorted(lengths)]
    slower = [
        LengthSpeed(speed.prompt_tokens, 3 * speed.ttft_ms, speed.token_generation_throughput_tps / 3)
        for speed in speeds
    ]
    factors = [loss.factor for loss in throughput_losses(speeds)]
    assert [loss.factor for loss in throughput_losses(slower)] == pytest.approx(factors)
    assert [(loss.shorter, loss.longer) for loss in throughput_losses(speeds)] == list(pairwise(sorted(lengths)))


def test_what_nobody_waits_for_is_no_loss():
    fast = [LengthSpeed(64, 0.5, 8000.0), LengthSpeed(128, 99.0, 101.0)]
    assert [loss.factor for loss in throughput_losses(fast)] == [1.0]
    slow = [LengthSpeed(64, 0.5, 8000.0), LengthSpeed(128, 101.0, 101.0)]
    assert [loss.factor for loss in throughput_losses(slow)] == [101.0]


@given(st.integers(33, 64), st.floats(0.0, 1.0))
def test_attention_explains_a_loss_of_two_whatever_the_last_step(last, share):
    """A mix of linear and quadratic work has losses between 1 and 2, also at a short last step."""
    speeds = [
        LengthSpeed(length, 200 * ((1 - share) * length / 32 + share * (length / 32) ** 2), 100.0)
        for length in (32, last)
    ]
    (loss,) = throughput_losses(speeds)
    assert 1 - 1e-9 <= loss.factor <= 2 + 1e-9
