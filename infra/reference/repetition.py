"""Endless repetition: an answer that ends, at its limit of tokens, in a loop."""

from collections.abc import Sequence

# Holtzman et al. 2020, The Curious Case of Neural Text Degeneration: a text repeats itself if it ends in a phrase of at
# least two tokens that is there at least three times.
MIN_PHRASE_TOKENS = 2
MIN_REPETITIONS = 3


def ends_in_repetition(token_ids: Sequence[int]) -> bool:
    """Whether the last tokens are one phrase, repeated; the last repetition may be cut anywhere."""
    longest = len(token_ids) // MIN_REPETITIONS
    return any(
        token_ids[-MIN_REPETITIONS * length : -length] == token_ids[-(MIN_REPETITIONS - 1) * length :]
        for length in range(MIN_PHRASE_TOKENS, longest + 1)
    )
