"""Perplexity and distance from the reference on a text file that the user names."""

from pydantic import BaseModel, ConfigDict, FiniteFloat

from tasks.statistics import Estimate


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextComparison(_Record):
    """A variant beside its reference on the beginning of a text; divergences in nats per token.

    The perplexities are over every token, the comparison of distributions is over `positions` of them. Figures are
    None where the variant's logits were not finite or there is no reference.
    """

    origin: str
    tokens: int
    positions: int
    finite_logits: FiniteFloat
    perplexity: FiniteFloat | None
    reference_perplexity: FiniteFloat | None
    perplexity_ratio: Estimate | None
    top1_agreement: Estimate | None
    kl_divergence: Estimate | None
    kl_divergence_p99: FiniteFloat | None
