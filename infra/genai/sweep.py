"""The sweep over prompt lengths: its lengths, its end, and losses of throughput between lengths."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from slmops.infra.genai.calls import SweptRequest

SHORTEST_PROMPT_TOKENS = 32
MAX_ROUNDS = 3  # a cliff counts only if all of them show it
# A response within 0.1 s seems immediate (Nielsen 1993, Usability Engineering, chapter 5), and people read about ten
# tokens a second. Within these limits users notice no cliff, and short disturbances of the machine would look like one.
IMMEDIATE_MS = 100.0
FASTER_THAN_READ_TPS = 100.0


@dataclass(frozen=True)
class LengthSpeed:
    """Speed at one prompt length: medians over the requests of its best round."""

    prompt_tokens: int
    ttft_ms: float
    token_generation_throughput_tps: float


@dataclass(frozen=True)
class ThroughputLoss:
    """The loss of throughput from one prompt length to the next; see `throughput_losses`."""

    shorter: int
    longer: int
    factor: float


def sweep_lengths(context_length: int, new_tokens: int, max_prompt_tokens: int | None) -> list[int]:
    """Powers of two from 32 on, and the longest prompt that the context allows together with `new_tokens`."""
    longest = context_length - new_tokens
    if max_prompt_tokens is not None:
        longest = min(longest, max_prompt_tokens)
    if longest < 1:
        return []
    powers = []
    length = SHORTEST_PROMPT_TOKENS
    while length < longest:
        powers.append(length)
        length *= 2
    return [*powers, longest]


def speed_by_length(rows: Sequence[SweptRequest]) -> list[LengthSpeed]:
    """Speeds by ascending length, from the sweep's rows.

    A length that was measured in several rounds has the best round's median, separately for TTFT and throughput,
    because other work of the machine can only slow down a request.
    """
    ordered = sorted(rows, key=lambda row: (row.prompt_tokens, row.round))
    speeds = []
    for length, group in groupby(ordered, key=lambda row: row.prompt_tokens):
        rounds = [list(requests) for _, requests in groupby(group, key=lambda row: row.round)]
        throughputs = [[row.token_generation_throughput_tps for row in requests] for requests in rounds]
        speeds.append(
            LengthSpeed(
                prompt_tokens=length,
                ttft_ms=min(statistics.median(row.ttft_ms for row in requests) for requests in rounds),
                token_generation_throughput_tps=max(statistics.median(values) for values in throughputs),
            )
        )
    return speeds


def throughput_losses(speeds: Sequence[LengthSpeed]) -> list[ThroughputLoss]:
    """The loss of throughput between each two neighbouring lengths: before over after, as if the length doubled.

    It is the larger of two losses: of prompt throughput (prompt tokens over TTFT) and of token generation
    throughput. Attention over the whole prompt explains a loss by the growth of the length, which is 2 from one
    power of two to the next. A last step may be shorter than a doubling; its loss is multiplied by 2 over its growth,
    so that 1 to 2 is what the arithmetic of a transformer explains at every step. A gain counts as 1, and so does a
    loss after which the TTFT is still within `IMMEDIATE_MS`, or generation faster than `FASTER_THAN_READ_TPS`.
    """
    losses = []
    for shorter, longer in pairwise(speeds):
        growth = longer.prompt_tokens / shorter.prompt_tokens
        factors = [1.0]
        if longer.ttft_ms > IMMEDIATE_MS:
            factors.append(longer.ttft_ms / shorter.ttft_ms / growth * max(1.0, 2 / growth))
        if longer.token_generation_throughput_tps < FASTER_THAN_READ_TPS:
            fell = shorter.token_generation_throughput_tps / longer.token_generation_throughput_tps
            factors.append(fell * max(1.0, 2 / growth))
        losses.append(ThroughputLoss(shorter.prompt_tokens, longer.prompt_tokens, max(factors)))
    return losses


@dataclass(frozen=True)
class SweepPlan:
    """Size of a sweep; `first_s` is the predicted time of one request of the first length, in s."""

    lengths: Sequence[int]
    repetitions: int
    budget_s: float
    max_cliff_ratio: float
    first_s: float


@dataclass(frozen=True)
class TimedRequest:
    """The result of one request of the sweep; see `slmops.infra.genai.calls.SweptRequest`."""

    new_tokens: int
    ttft_ms: float
    token_generation_throughput_tps: float
    e2e_latency_ms: float
    finite_logits: bool
    answered: bool | None


def sweep(
    plan: SweepPlan,
    request: Callable[[int], TimedRequest],
    has_room: Callable[[int], bool],
    on_request: Callable[[str], None],
) -> tuple[list[SweptRequest], list[str]]:
    """Make requests of growing length; returns their rows, and notes on lengths that were omitted or measured again.

    `request(prompt_tokens)` makes one; `has_room(prompt_tokens)` says whether there is enough memory. The sweep stops
    before a length whose time, predicted from the two previous lengths, would exceed the budget. The two lengths of a
    loss beyond `max_cliff_ratio` are measured again, even beyond the budget, because the model may be rejected for it.
    """
    rows: list[SweptRequest] = []
    notes: list[str] = []
    spent: list[tuple[int, float]] = []

    def measure(length: int, number: int) -> float:
        seconds = 0.0
        for repetition in range(plan.repetitions):
            on_request(f"sweep, {length} prompt tokens")
            found = request(length)
            seconds += found.e2e_latency_ms / 1000
            rows.append(_row(found, length, number, repetition))
        return seconds

    for length in plan.lengths:
        predicted_s = _predict(spent, length) if spent else plan.repetitions * plan.first_s
        if sum(seconds for _, seconds in spent) + predicted_s > plan.budget_s:
            notes.append(
                f"The sweep stopped before {length} prompt tokens: their {plan.repetitions} requests would take about "
                f"{predicted_s:.0f} s, beyond its budget of {plan.budget_s:.0f} s."
            )
            break
        if not has_room(length):
            notes.append(f"The sweep stopped before {length} prompt tokens: the memory might not be sufficient.")
            break
        spent.append((length, measure(length, 0)))

    for number in range(1, MAX_ROUNDS):
        cliffs = _cliffs(rows, plan.max_cliff_ratio)
        if not cliffs:
            break
        for length in sorted({length for loss in cliffs for length in (loss.shorter, loss.longer)}):
            measure(length, number)
        remaining = {loss.longer for loss in _cliffs(rows, plan.max_cliff_ratio)}
        for loss in cliffs:
            verdict = "it is still there" if loss.longer in remaining else "it is gone"
            notes.append(
                f"Throughput fell by a factor of {loss.factor:.1f} from {loss.shorter} to {loss.longer} prompt tokens; "
                f"both were measured again: {verdict}."
            )
    return rows, notes


def _row(found: TimedRequest, prompt_tokens: int, number: int, repetition: int) -> SweptRequest:
    return SweptRequest(
        prompt_tokens=prompt_tokens,
        new_tokens=found.new_tokens,
        repetition=repetition,
        round=number,
        ttft_ms=found.ttft_ms,
        token_generation_throughput_tps=found.token_generation_throughput_tps,
        finite_logits=found.finite_logits,
        answered=found.answered,
    )


def _cliffs(rows: Sequence[SweptRequest], max_cliff_ratio: float) -> list[ThroughputLoss]:
    return [loss for loss in throughput_losses(speed_by_length(rows)) if loss.factor > max_cliff_ratio]


def _predict(spent: Sequence[tuple[int, float]], length: int) -> float:
    """Extrapolate the time of a length's requests from the last two lengths, between linear and quadratic."""
    last, last_s = spent[-1]
    exponent = 1.0
    if len(spent) > 1:
        before, before_s = spent[-2]
        exponent = min(2.0, max(1.0, math.log(last_s / before_s) / math.log(last / before)))
    return float(last_s * (length / last) ** exponent)
