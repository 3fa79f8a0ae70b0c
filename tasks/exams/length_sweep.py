"""The length sweep: speed and validity as the prompt grows towards the context's limit."""

import math
from collections.abc import Collection, Iterator

from pydantic import FiniteFloat

from slmops.infra.genai.sweep import speed_by_length, throughput_losses
from slmops.infra.records import Record
from slmops.tasks.exams.estimates import Estimate, slope
from slmops.tasks.exams.measurement import Measurement

# Below this length a request's fixed cost is larger than the cost of the prompt's length.
SHORTEST_SCALED_PROMPT_TOKENS = 64
MIN_LENGTHS_OF_A_SLOPE = 3  # two points give a slope without an interval


class LengthFigures(Record):
    """Medians at one prompt length; `valid` if every logit was finite and each chat's answer was text."""

    prompt_tokens: int
    ttft_ms: FiniteFloat
    token_generation_throughput_tps: FiniteFloat
    valid: bool


class LengthSweep(Record):
    """The sweep over prompt lengths.

    `ttft_scaling_exponent` is that of TTFT ~ length^exponent (1: linear), fitted on the logarithms over the lengths
    from 64 on; None with fewer than three of them. `worst_cliff_ratio` is the largest loss of throughput from one
    length to the next, as a factor (`slmops.infra.genai.sweep.throughput_losses`: 1 to 2 is what attention explains),
    and `worst_cliff_prompt_tokens` the longer of the two lengths; None with a single length.
    """

    lengths: tuple[LengthFigures, ...]
    ttft_scaling_exponent: Estimate | None
    worst_cliff_ratio: FiniteFloat | None
    worst_cliff_prompt_tokens: int | None
    notes: tuple[str, ...]

    @property
    def invalid_prompt_tokens(self) -> tuple[int, ...]:
        """The lengths at which the answer was not valid."""
        return tuple(length.prompt_tokens for length in self.lengths if not length.valid)


def length_sweep_of(measurement: Measurement, silent_in_source: Collection[int] = ()) -> LengthSweep:
    """Return the record of a measurement's sweep; without a sweep it has no lengths."""
    speeds = speed_by_length(measurement.sweep)
    lengths = tuple(
        LengthFigures(
            prompt_tokens=speed.prompt_tokens,
            ttft_ms=speed.ttft_ms,
            token_generation_throughput_tps=speed.token_generation_throughput_tps,
            valid=all(
                row.finite_logits and (row.answered is not False or row.prompt_tokens in silent_in_source)
                for row in measurement.sweep
                if row.prompt_tokens == speed.prompt_tokens
            ),
        )
        for speed in speeds
    )
    scaled = [speed for speed in speeds if speed.prompt_tokens >= SHORTEST_SCALED_PROMPT_TOKENS]
    exponent = None
    if len(scaled) >= MIN_LENGTHS_OF_A_SLOPE:
        exponent = slope(
            [math.log(speed.prompt_tokens) for speed in scaled], [math.log(speed.ttft_ms) for speed in scaled]
        )
    worst = max(throughput_losses(speeds), key=lambda loss: loss.factor, default=None)
    return LengthSweep(
        lengths=lengths,
        ttft_scaling_exponent=exponent,
        worst_cliff_ratio=worst.factor if worst else None,
        worst_cliff_prompt_tokens=worst.longer if worst else None,
        notes=(*measurement.sweep_notes, *_on_silence(measurement, silent_in_source)),
    )


def _on_silence(measurement: Measurement, silent_in_source: Collection[int]) -> Iterator[str]:
    silent = sorted({row.prompt_tokens for row in measurement.sweep if row.answered is False} & {*silent_in_source})
    if silent:
        lengths = ", ".join(f"{length:,}" for length in silent)
        yield f"At {lengths} prompt tokens it gives no text for the sweep's chat, like the source checkpoint."
