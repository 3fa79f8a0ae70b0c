"""Steadiness: how speed and validity hold as the prompt grows towards the context's limit."""

from pydantic import BaseModel, ConfigDict, FiniteFloat

from tasks.statistics import Estimate


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LengthFigures(_Record):
    """Medians at one prompt length; `valid` when every logit was finite and the answer was text."""

    prompt_tokens: int
    ttft_ms: FiniteFloat
    token_generation_throughput_tps: FiniteFloat
    valid: bool


class Steadiness(_Record):
    """The sweep over prompt lengths.

    `ttft_scaling_exponent` is that of TTFT ~ length^exponent (1: linear). `worst_cliff_ratio` is the largest loss of
    throughput from one length to the next, as a factor, and `worst_cliff_prompt_tokens` where it is.
    """

    lengths: tuple[LengthFigures, ...]
    ttft_scaling_exponent: Estimate | None
    worst_cliff_ratio: FiniteFloat | None
    worst_cliff_prompt_tokens: int | None
    notes: tuple[str, ...]

    @property
    def invalid_prompt_tokens(self) -> tuple[int, ...]:
        """The lengths at which the answer was not valid."""
        return tuple(one.prompt_tokens for one in self.lengths if not one.valid)
