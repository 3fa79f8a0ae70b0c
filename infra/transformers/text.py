"""The source checkpoint on a text: the log-probability of every token, and logits at some positions for comparison."""

import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.infra.errors import StageFailed
from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import LOGITS_FILE
from slmops.infra.reference.distributions import log_probability
from slmops.infra.reference.text import (
    TEXT_FILE,
    SourceText,
    SourceWindow,
    begin_token_ids,
    compared_positions,
    cut_windows,
    scored_positions,
)
from slmops.infra.transformers.calls import ScoreTextAsSource
from slmops.infra.transformers.loading import load_to_answer


def score_text(call: ScoreTextAsSource, progress: Progress) -> SourceText:
    """Score the tokens of a text with the source checkpoint and write the logits at the compared positions.

    The text is divided into windows of `window_tokens` tokens (fewer if the context is shorter). Each is scored without
    the text before it, after the tokens that the tokenizer adds at a text's beginning (a begin token; without any, a
    window's first token is not scored). The window is fed in pieces with a cache, so that at most `chunk_bytes` of
    logits exist at once.

    Raises `BadInput` for a text of fewer than two tokens, `StageFailed` for a checkpoint that cannot be loaded or
    whose logits are not finite.
    """
    import torch

    torch.set_num_threads(call.threads)
    output_dir = call.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    progress(0, 1, "loading the source checkpoint")
    tokenizer, model = load_to_answer(call.checkpoint_dir)
    content = call.text_file.read_bytes()
    token_ids = _encode(tokenizer, content.decode())[: call.max_tokens]
    begin = begin_token_ids(tokenizer("a")["input_ids"], _encode(tokenizer, "a"))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or call.window_tokens
    windows = cut_windows(token_ids, begin, min(call.window_tokens, context - len(begin)))
    chosen = compared_positions(windows, begin, call.max_positions)
    vocabulary_size: int = model.get_output_embeddings().weight.shape[0]
    chunk_tokens = max(1, call.chunk_bytes // (4 * vocabulary_size))
    scored: list[SourceWindow] = []
    with (output_dir / LOGITS_FILE).open("wb") as file:
        # Written row by row, because the pages of a mapped array would count as this process's memory.
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
            scored.append(
                SourceWindow(
                    token_ids=tuple(window), log_probabilities=tuple(log_probabilities), positions=tuple(positions)
                )
            )
    result = SourceText(
        windows=tuple(scored),
        begin=tuple(begin),
        tokens=sum(len(window) - len(begin) for window in windows),
        text_sha256=hashlib.sha256(content).hexdigest(),
        vocabulary_size=vocabulary_size,
        tokenizer_size=max(tokenizer.get_vocab().values()) + 1,
        dtype=str(model.dtype).removeprefix("torch."),
        versions={package: version(package) for package in ("torch", "transformers", "tokenizers")},
    )
    (output_dir / TEXT_FILE).write_text(result.model_dump_json(), "utf-8", newline="\n")
    return result


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _logits_of(model: Any, window: Sequence[int], chunk_tokens: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield each position of a window except the last, and its logits; `chunk_tokens` positions are in memory."""
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
            code="logits-not-finite",
        )
    return value
