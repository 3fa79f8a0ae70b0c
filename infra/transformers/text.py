"""The source checkpoint on a text: the log-probability of every token, and logits at some positions to compare with."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.call import Progress
from slmops.infra.transformers.reference import LOGITS_FILE, choose_positions, load_checkpoint

TEXT_REFERENCE_FILE = "text.json"
# Bound on the float32 logits that are held at once: 220 positions of a vocabulary of 152 k.
LOGITS_CHUNK_BYTES = 128 * 2**20


def begin_token_ids(with_special_tokens: Sequence[int], without: Sequence[int]) -> list[int]:
    """Token ids that a tokenizer puts before a text, from one text's ids with and without its special tokens."""
    for start in range(len(with_special_tokens) - len(without) + 1):
        if list(with_special_tokens[start : start + len(without)]) == list(without):
            return list(with_special_tokens[:start])
    return []


def cut_windows(token_ids: Sequence[int], begin: Sequence[int], window_tokens: int) -> list[list[int]]:
    """Cut a text into windows of `window_tokens` of its tokens, each after the `begin` tokens; the last is shorter.

    A window of which no token has a predecessor to be predicted from is left out: a last single token without
    `begin`. Raises `BadInput` for a text of fewer than two tokens.
    """
    if len(token_ids) < 2:
        raise BadInput(
            f"The text has {len(token_ids)} token(s), and a perplexity needs at least 2.", "Name a longer text."
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


def log_probability(logits: NDArray[np.float32], token: int) -> float:
    """Log-probability of a token in nats, computed in float64; NaN when the logits are not finite."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    shifted = float(wide[token])
    return shifted - float(np.log(np.exp(wide, out=wide).sum()))


def text_reference(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Score the tokens of a text with the source checkpoint and write the logits at the compared positions.

    Request: `checkpoint_dir`, `text_file` (UTF-8), `max_tokens` (from the text's beginning), `window_tokens`,
    `max_positions`, `threads`, `dtype`, `output_dir`, `chunk_bytes` (optional).

    The text is cut into windows of `window_tokens` tokens (fewer where the context ends earlier); each is scored
    without what stands before it, after the tokens that the tokenizer itself puts at a text's beginning (a begin
    token, or none: then a window's first token is given and not scored). The window is fed in pieces with a cache,
    so that no more than `chunk_bytes` of logits exist at once.

    `output_dir` gets `logits.npy` (float32, [positions, vocabulary]) and `text.json`, a copy of the result.

    Result: `windows` [{token_ids, log_probabilities (nats, of the scored tokens in order), positions (indices into
    token_ids of the token before the predicted one)}], `begin` (token ids), `tokens` (of the text, in the windows),
    `text_sha256`, `vocabulary_size`, `tokenizer_size` (highest token id + 1), `dtype`, `versions`.

    Raises `BadInput` for a text of fewer than two tokens, `StageFailed` for a checkpoint that cannot be loaded or
    whose logits are not finite.
    """
    import torch

    torch.set_num_threads(request["threads"])
    output_dir = Path(request["output_dir"])
    output_dir.mkdir(parents=True, exist_ok=True)
    progress(0, 1, "loading the source checkpoint")
    tokenizer, model = load_checkpoint(request["checkpoint_dir"], request["dtype"])
    content = Path(request["text_file"]).read_bytes()
    token_ids = _encode(tokenizer, content.decode())[: request["max_tokens"]]
    begin = begin_token_ids(tokenizer("a")["input_ids"], _encode(tokenizer, "a"))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or request["window_tokens"]
    windows = cut_windows(token_ids, begin, min(request["window_tokens"], context - len(begin)))
    chosen = compared_positions(windows, begin, request["max_positions"])
    vocabulary_size: int = model.get_output_embeddings().weight.shape[0]
    chunk_tokens = max(1, request.get("chunk_bytes", LOGITS_CHUNK_BYTES) // (4 * vocabulary_size))
    scored: list[dict[str, Any]] = []
    with (output_dir / LOGITS_FILE).open("wb") as file:
        # Written row by row: the pages of a mapped array would count as this process's memory.
        shape = (sum(len(positions) for positions in chosen), vocabulary_size)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for done, (window, positions) in enumerate(zip(windows, chosen, strict=True)):
            progress(done, len(windows), "reference on the text")
            wanted, scores = set(positions), scored_positions(window, begin)
            log_probabilities = []
            for position, logits in _logits_of(model, window, chunk_tokens):
                if position not in scores:
                    continue
                log_probabilities.append(_checked(log_probability(logits, window[position + 1])))
                if position in wanted:
                    file.write(logits.astype("<f4", copy=False).tobytes())
            scored.append({"token_ids": window, "log_probabilities": log_probabilities, "positions": positions})
    result = {
        "windows": scored,
        "begin": begin,
        "tokens": sum(len(window) - len(begin) for window in windows),
        "text_sha256": hashlib.sha256(content).hexdigest(),
        "vocabulary_size": vocabulary_size,
        "tokenizer_size": max(tokenizer.get_vocab().values()) + 1,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
    }
    (output_dir / TEXT_REFERENCE_FILE).write_text(json.dumps(result), "utf-8")
    return result


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _logits_of(model: Any, window: Sequence[int], chunk_tokens: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield each position of a window but the last and its logits, `chunk_tokens` positions in memory at a time."""
    import torch

    cache = None
    for start in range(0, len(window) - 1, chunk_tokens):
        ids = torch.tensor([window[start : min(start + chunk_tokens, len(window) - 1)]])
        with torch.inference_mode():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield from enumerate(output.logits[0].float().numpy(), start)
        del output  # before the next chunk's logits are made


def _checked(value: float) -> float:
    if not np.isfinite(value):
        raise StageFailed(
            "The source checkpoint itself gives logits that are not finite on the text.",
            "Its weights hold NaN or infinity, or overflow: repair the training before it is deployed.",
        )
    return value
