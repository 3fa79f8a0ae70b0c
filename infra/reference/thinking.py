"""Reasoning in tokens: the limits of an answer's thoughts and text, and its split into both."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from slmops.infra.reasoning import ThoughtMarks
from slmops.infra.records import Record
from slmops.infra.reference.answers import Thoughts

Decode = Callable[[Sequence[int]], str]
_MARK_TOKENS = 16  # no mark has more tokens, whatever the vocabulary


class Thinking(Record):
    """The marks of a model's thoughts, and how many tokens its thoughts may have, marks included."""

    marks: ThoughtMarks
    max_tokens: int


class TokenCounter:
    """Counts an answer's tokens as they are generated: those of its thoughts, and those of its text.

    `decode` keeps control tokens; `opened` says that the prompt has the start mark.
    """

    def __init__(self, thinking: Thinking, max_text_tokens: int, decode: Decode, *, opened: bool) -> None:
        self._thinking, self._max_text_tokens, self._decode = thinking, max_text_tokens, decode
        self._ids: list[int] = []
        self._thinks = opened
        self._begins = not opened
        self._of_text = 0
        self._begun = 0  # the index behind the start mark of the present thoughts

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return len(self._ids)

    def add(self, token: int) -> bool:
        """Count a token; return whether the answer is to end with it."""
        self._ids.append(token)
        marks = self._thinking.marks
        if self._thinks:
            self._thinks = marks.end not in self._decode(self._ids[max(self._begun, len(self._ids) - _MARK_TOKENS) :])
            return self._thinks and len(self._ids) >= self._thinking.max_tokens
        self._of_text += 1
        if self._begins:
            begun = self._decode(self._ids).lstrip()
            self._thinks = begun.startswith(marks.start)
            self._begins = marks.start.startswith(begun) and not self._thinks and len(self._ids) < _MARK_TOKENS
            self._of_text = 0 if self._thinks else self._of_text
        elif marks.continued:
            self._thinks = self._decode(self._ids[-_MARK_TOKENS:]).endswith(marks.continued)
        self._begun = len(self._ids) if self._thinks else 0
        return not (self._thinks or self._begins) and self._of_text >= self._max_text_tokens


class SplitTokens(NamedTuple):
    """The texts of an answer's thoughts (None: it has none) and of the rest, and the number of tokens before the rest.

    `ended` is false for thoughts without an end mark.
    """

    thoughts: str | None
    text: str
    tokens: int
    ended: bool

    @property
    def record(self) -> Thoughts | None:
        """The thoughts' record."""
        if self.thoughts is None:
            return None
        return Thoughts(text=self.thoughts.strip(), tokens=self.tokens, ended=self.ended)


def split_tokens(
    marks: ThoughtMarks, token_ids: Sequence[int], *, opened: bool, whole: Decode, shown: Decode
) -> SplitTokens:
    """Split an answer by its tokens, because marks may be control tokens.

    `whole` decodes with control tokens, `shown` as the answer is shown; both parts are decoded by `shown`.
    """
    text = whole(token_ids)
    spans = marks.spans(text, opened=opened)
    if spans.thoughts is None and spans.text == slice(0, len(text)):
        return SplitTokens(None, shown(token_ids), 0, ended=True)

    def decoded(span: slice) -> str:
        start = _tokens_before(token_ids, span.start, whole)
        stop = _tokens_before(token_ids, span.stop, whole)
        # A token may have characters of a mark and of the text behind it.
        return text[span.start : min(len(whole(token_ids[:start])), span.stop)] + shown(token_ids[start:stop])

    thoughts = None if spans.thoughts is None else decoded(spans.thoughts)
    return SplitTokens(
        thoughts, decoded(spans.text), _tokens_before(token_ids, spans.text.start, whole), ended=spans.ended
    )


def _tokens_before(token_ids: Sequence[int], offset: int, whole: Decode) -> int:
    """Return the number of tokens that the characters before an offset are in."""
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        if len(whole(token_ids[:middle])) < offset:
            low = middle + 1
        else:
            high = middle
    return low
