"""A source checkpoint's answers, as transformers writes them and onnxruntime-genai reads them."""

import itertools
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, StrictInt, StrictStr

from slmops.infra.records import Json, Record, Untyped, later_field

ANSWERS_FILE = "reference.json"
LOGITS_FILE = "logits.npy"

RowId = StrictInt | Annotated[StrictStr, Field(min_length=1)]
Message = dict[str, Untyped]  # role and content as texts; with tools also calls, see OpenAI's API
Share = Annotated[float, Field(ge=0, le=1)]


class Question(Record):
    """A chat that ends with a user's turn or a tool's result; `expected` is the complete correct answer, if known.

    `tools` are OpenAI's, for the chat template, and `template_prefix` is Jinja that stands before the template, such as
    a mode of its reasoning. With `keeps_control_tokens`, the answer's text has its control tokens,
    because calls of tools may stand between them.
    """

    id: RowId
    messages: tuple[Message, ...]
    expected: str | None = None
    tools: tuple[Json, ...] = later_field(())
    keeps_control_tokens: bool = later_field(False)
    template_prefix: str = later_field("")


class Thoughts(Record):
    """What a model wrote before its answer; `tokens` with their marks. `ended` is false without an end mark."""

    text: str
    tokens: int
    ended: bool


class SourceAnswer(Record):
    """The greedy answer to one question; `answer` has no thoughts, `answer_ids` and `max_new_tokens` include them.

    `positions` are indices into `prompt_ids + answer_ids`, each of the token before the predicted one;
    `exact_match` is None without an expected answer. `ended` says whether an end token was reached, which is then the
    last of `answer_ids`; `repeats`, whether it was not and the answer ends in a loop (`ends_in_repetition`).
    """

    id: RowId
    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    max_new_tokens: int
    positions: tuple[int, ...]
    exact_match: bool | None
    ended: bool | None = None
    thoughts: Thoughts | None = later_field(None)
    repeats: bool = later_field(False)


class SourceAnswers(Record):
    """The source checkpoint's greedy answers, and the shape and digest of its logits at the compared positions.

    `logits.npy` in the same folder is float32, [positions, vocabulary_size], row by row in the order of `rows`.
    `tokenizer_size` is the highest token id + 1, `dtype` that of the loaded weights.
    """

    rows: tuple[SourceAnswer, ...]
    exact_match: Share | None
    positions: int
    vocabulary_size: int
    tokenizer_size: int
    logits_sha256: str
    answers_sha256: str
    dtype: str
    versions: dict[str, str]


def choose_positions(lengths: Sequence[int], max_positions: int) -> list[list[int]]:
    """Choose indices into sequences of `lengths`: `max_positions` in all, or every index if there are fewer.

    They are evenly spaced over the sequences laid end to end, so that every part of a sequence has the same weight
    and different rows give different parts.
    """
    total = sum(lengths)
    count = min(total, max_positions)
    laid_out = [(2 * step + 1) * total // (2 * count) for step in range(count)]
    starts = [0, *itertools.accumulate(lengths)]
    bounds = itertools.pairwise(starts)
    return [[position - start for position in laid_out if start <= position < end] for start, end in bounds]


def matches(answer: str, expected: str | None) -> bool | None:
    """Exact match after stripping white space at both ends; None without an expected answer."""
    return None if expected is None else answer.strip() == expected.strip()


def share_of(flags: Sequence[bool | None]) -> float | None:
    """Share of True among the flags that are not None; None if there are none."""
    counted = [flag for flag in flags if flag is not None]
    return sum(counted) / len(counted) if counted else None
