"""Comparison of two next-token distributions given as logits."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# In nats: two tokens whose log-probabilities differ by less are a near tie, which rounding to eight bits may decide
# otherwise. docs/evaluation.md has the measurement.
NEAR_TIE = 0.25


def are_comparable(variant_size: int, reference_size: int, tokenizer_size: int) -> bool:
    """Whether the additional entries of the larger vocabulary are padding that no token of the tokenizer uses."""
    return variant_size == reference_size or min(variant_size, reference_size) >= tokenizer_size


@dataclass(frozen=True)
class PositionComparison:
    """A variant's distribution compared with the reference's at one position.

    `agrees` says whether both have the same first choice, `nearly_agrees` whether the variant's first choice is the
    reference's or a near tie with it. `kl_divergence` is KL(reference || variant) and the log-probabilities are those
    of the next token in the reference's text, all in nats. They are None if the variant's logits are not all finite;
    such a position counts as a disagreement.
    """

    finite: bool
    agrees: bool
    nearly_agrees: bool
    kl_divergence: float | None
    log_probability: float | None
    reference_log_probability: float


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64 and shifted by the maximum, so that nothing overflows."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(shifted, np.float64)


def kl_divergence(reference: NDArray[np.float64], variant: NDArray[np.float64]) -> float:
    """KL(reference || variant) of two vectors of log-probabilities, in nats: sum of p (ln p - ln q).

    Kullback and Leibler, 1951. Rounding can leave the sum slightly below zero; it is then set to zero.
    """
    return max(0.0, float(np.sum(np.exp(reference) * (reference - variant))))


def compare_position(reference: NDArray[Any], variant: NDArray[Any], next_token: int) -> PositionComparison:
    """Compare two vectors of logits over the same vocabulary; those of the reference are finite."""
    expected = log_softmax(reference)
    if not np.isfinite(variant).all():
        return PositionComparison(False, False, False, None, None, float(expected[next_token]))
    found = log_softmax(variant)
    chosen = variant.argmax()
    agrees = bool(reference.argmax() == chosen)
    return PositionComparison(
        finite=True,
        agrees=agrees,
        nearly_agrees=agrees or bool(expected.max() - expected[chosen] < NEAR_TIE),
        kl_divergence=kl_divergence(expected, found),
        log_probability=float(found[next_token]),
        reference_log_probability=float(expected[next_token]),
    )


def log_probability(logits: NDArray[np.float32], token: int) -> float:
    """Log-probability of a token in nats, computed in float64; NaN when the logits are not finite."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    shifted = float(wide[token])
    return shifted - float(np.log(np.exp(wide, out=wide).sum()))
