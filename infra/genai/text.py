"""A genai model folder on a text: the log-probability of every token, and its distance from the source checkpoint."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slmops.infra.errors import StageFailed
from slmops.infra.genai.calls import ComparedText, CompareText, ScoredWindow
from slmops.infra.genai.runtime import GenaiModel, package_versions
from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import LOGITS_FILE
from slmops.infra.reference.distributions import (
    PositionComparison,
    are_comparable,
    compare_position,
    log_probability,
)
from slmops.infra.reference.text import TEXT_FILE, SourceText, begin_token_ids, cut_windows, scored_positions

# The runtime's own tensor, the binding's array, the chosen rows and their float32 copy exist at the same time.
COPIES_OF_A_CHUNK = 4


def compare_text(call: CompareText, progress: Progress) -> ComparedText:
    """Score the tokens of a text and compare the next-token distributions with the reference's.

    Tokens and windows are the reference's; without a reference, the runtime's tokenizer makes them by the same rules.
    Each side's log-probabilities are over its whole vocabulary. At most `chunk_bytes` of logits exist at once.

    Raises `BadInput` for a text of fewer than two tokens, `StageFailed` for a model that cannot be run, a vocabulary
    that is not the reference's, or a reference of another text.
    """
    progress(0, 1, "loading the model")
    model = GenaiModel(call.model_dir, threads=call.threads, all_positions=True)
    content = call.text_file.read_bytes()
    reference = _TextReference(call.reference_dir, content) if call.reference_dir else None
    windows: Sequence[Sequence[int]]
    if reference:
        begin: Sequence[int] = reference.begin
        windows = [window.token_ids for window in reference.windows]
        vocabulary = reference.comparable_vocabulary(model.vocabulary_size)
    else:
        begin = begin_tokens_of(model.model_dir)
        token_ids = [int(token) for token in model.tokenizer.encode(content.decode())][: call.max_tokens]
        windows = cut_windows(token_ids, begin, min(call.window_tokens, model.context_length - len(begin)))
        vocabulary = model.vocabulary_size
    chunk_bytes = call.chunk_bytes // COPIES_OF_A_CHUNK
    scored: list[ScoredWindow] = []
    divergences: list[float | None] = []
    for done, window in enumerate(windows):
        progress(done, len(windows), "text")
        positions = scored_positions(window, begin)
        expected = reference.logits_of(done) if reference else iter(())
        compared = set(reference.windows[done].positions) if reference else set()
        log_probabilities: list[float] = []
        comparisons: list[PositionComparison] = []
        for position, logits in zip(positions, model.logits_at(window, positions, chunk_bytes), strict=True):
            following = window[position + 1]
            finite = bool(np.isfinite(logits).all())
            log_probabilities.append(log_probability(logits, following) if finite else math.nan)
            if position in compared:
                comparisons.append(compare_position(next(expected)[:vocabulary], logits[:vocabulary], following))
        scored.append(
            ScoredWindow(
                tokens=len(positions),
                finite_tokens=sum(not math.isnan(value) for value in log_probabilities),
                log_probability=_sum(log_probabilities),
                reference_log_probability=reference.log_probability_of(done) if reference else None,
                positions=len(comparisons),
                agreeing=sum(comparison.agrees for comparison in comparisons),
                nearly_agreeing=sum(comparison.nearly_agrees for comparison in comparisons),
                kl_divergence=_sum([_known(comparison.kl_divergence) for comparison in comparisons]),
            )
        )
        divergences += [comparison.kl_divergence for comparison in comparisons]
    known = [value for value in divergences if value is not None]
    return ComparedText(
        windows=tuple(scored),
        tokens=sum(len(window) - len(begin) for window in windows),
        window_tokens=max(len(window) - len(begin) for window in windows),
        kl_divergence_p99=float(np.percentile(known, 99)) if known and len(known) == len(divergences) else None,
        last_position_only=model.gives_last_position_only,
        threads=call.threads,
        versions=package_versions(),
    )


def begin_tokens_of(model_dir: Path) -> list[int]:
    """Token ids that the model's tokenizer.json adds before a text; the runtime's tokenizer omits them."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    except Exception as error:  # the library raises bare exceptions
        raise StageFailed(
            f"The tokenizer.json in {model_dir} cannot be read: {error}.", "Build the model again."
        ) from error
    return begin_token_ids(tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids)


class _TextReference:
    """The files that the reference's child process wrote for a text; the logits are read row by row."""

    def __init__(self, directory: Path, text: bytes) -> None:
        content = SourceText.model_validate_json((directory / TEXT_FILE).read_bytes())
        if content.text_sha256 != hashlib.sha256(text).hexdigest():
            raise StageFailed(
                f"The reference in {directory} was made for another text.",
                "Make the reference again.",
                code="reference-of-another-text",
            )
        self.windows, self.begin = content.windows, content.begin
        self._path = directory / LOGITS_FILE
        self._vocabulary_size, self._tokenizer_size = content.vocabulary_size, content.tokenizer_size

    def comparable_vocabulary(self, variant_size: int) -> int:
        """Size of the common vocabulary; additional entries of either side must be padding that no token uses."""
        if not are_comparable(variant_size, self._vocabulary_size, self._tokenizer_size):
            raise StageFailed(
                f"The variant's vocabulary has {variant_size} tokens and the reference's {self._vocabulary_size}, "
                f"of which the tokenizer uses {self._tokenizer_size}.",
                "The model was not built from this checkpoint: build it again.",
                code="reference-of-other-vocabulary",
            )
        return min(variant_size, self._vocabulary_size)

    def log_probability_of(self, index: int) -> float:
        """Sum of the log-probabilities of a window's tokens."""
        return math.fsum(self.windows[index].log_probabilities)

    def logits_of(self, index: int) -> Iterator[NDArray[np.float32]]:
        """Yield the logits at the compared positions of a window."""
        before = sum(len(window.positions) for window in self.windows[:index])
        with self._path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(4 * self._vocabulary_size * before, 1)
            for _ in self.windows[index].positions:
                yield np.fromfile(file, "<f4", self._vocabulary_size)


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _sum(values: Sequence[float]) -> float | None:
    total = math.fsum(values) if values else math.nan
    return total if math.isfinite(total) else None
