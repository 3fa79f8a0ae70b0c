"""A source checkpoint's scores of a text, as transformers writes them and onnxruntime-genai reads them."""

from collections.abc import Sequence

from slmops.infra.errors import BadInput
from slmops.infra.records import Record
from slmops.infra.reference.answers import choose_positions

TEXT_FILE = "text.json"
# Limit on the float32 logits in memory: 220 positions of a vocabulary of 152 k.
LOGITS_CHUNK_BYTES = 128 * 2**20


class SourceWindow(Record):
    """A window of the text: log-probabilities of the scored tokens, in nats and in order.

    `positions` are indices into `token_ids` of the token before the predicted one, where logits were kept.
    """

    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    positions: tuple[int, ...]


class SourceText(Record):
    """The source checkpoint's scores of a text's tokens; `begin` are the token ids before each window.

    `tokens` counts those of the text in the windows. `logits.npy` in the same folder is float32, [positions,
    vocabulary_size]. `tokenizer_size` is the highest token id + 1.
    """

    windows: tuple[SourceWindow, ...]
    begin: tuple[int, ...]
    tokens: int
    text_sha256: str
    vocabulary_size: int
    tokenizer_size: int
    dtype: str
    versions: dict[str, str]


def begin_token_ids(with_special_tokens: Sequence[int], without: Sequence[int]) -> list[int]:
    """Token ids that a tokenizer adds before a text, found from one text's ids with and without special tokens."""
    for start in range(len(with_special_tokens) - len(without) + 1):
        if list(with_special_tokens[start : start + len(without)]) == list(without):
            return list(with_special_tokens[:start])
    return []


def cut_windows(token_ids: Sequence[int], begin: Sequence[int], window_tokens: int) -> list[list[int]]:
    """Cut a text into windows of `window_tokens` of its tokens, each after the `begin` tokens; the last is shorter.

    A window without a token that has a predecessor is left out: a last single token without `begin`. Raises `BadInput`
    for a text of fewer than two tokens.
    """
    if len(token_ids) < 2:
        raise BadInput(
            f"The text has {len(token_ids)} token(s); a perplexity needs at least 2.",
            "Name a longer text.",
            code="text-too-short",
        )
    starts = range(0, len(token_ids), window_tokens)
    windows = [[*begin, *token_ids[start : start + window_tokens]] for start in starts]
    return [window for window in windows if scored_positions(window, begin)]


def scored_positions(window: Sequence[int], begin: Sequence[int]) -> range:
    """Indices into a window of the tokens whose successor is a token of the text."""
    return range(max(0, len(begin) - 1), len(window) - 1)


def compared_positions(windows: Sequence[Sequence[int]], begin: Sequence[int], max_positions: int) -> list[list[int]]:
    """Choose at most `max_positions` of the windows' scored positions, evenly over the whole text."""
    scored = [scored_positions(window, begin) for window in windows]
    chosen = choose_positions([len(positions) for positions in scored], max_positions)
    return [[positions[index] for index in indices] for positions, indices in zip(scored, chosen, strict=True)]
