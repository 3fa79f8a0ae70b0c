"""Reasoning: the marks between which a model writes its thoughts, and the split of its answers.

The forms are those of the chat templates of the Hub. A template shows its form by the end mark, which it needs to take
old thoughts out of a prompt; the start mark may be missing, where the model writes it or the prompt ends with it.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from slmops.infra.records import Record, later_field


class SplitAnswer(NamedTuple):
    """An answer's thoughts (None: it has none) and its text, without their marks; `ended` thoughts have an end mark.

    Without thoughts, `ended` is true.
    """

    thoughts: str | None
    text: str
    ended: bool


class Spans(NamedTuple):
    """Where an answer's thoughts (None: it has none) and its text lie, as offsets of characters without the marks."""

    thoughts: slice | None
    text: slice
    ended: bool


class ThoughtMarks(Record):
    """The marks of a model's thoughts.

    `continued` is a start mark behind finished thoughts. `text_starts` and `text_end` are marks around the text that
    follows thoughts. `shown_by` says where the marks were found: a vocabulary may have marks that its model never uses.
    """

    start: str
    end: str
    continued: str | None = later_field(None)
    text_starts: tuple[str, ...] = later_field(())
    text_end: str | None = later_field(None)
    shown_by: Literal["template", "vocabulary"] = "template"

    def is_opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends with the start mark, so that the answer begins with thoughts (as DeepSeek-R1's do)."""
        return prompt.rstrip().endswith(self.start.rstrip())

    def spans(self, answer: str, *, opened: bool) -> Spans:
        """Find thoughts at the beginning of an answer; `opened` says that its prompt has the start mark.

        Marks behind the beginning of the text are text: a model may write about them.
        """
        begin = self._behind(answer, 0, self.start)
        if begin is None and not opened:
            return Spans(None, self._text(answer, 0), ended=True)
        begin = position = begin or 0
        while (stop := answer.find(self.end, position)) >= 0:
            rest = stop + len(self.end)
            more = self._behind(answer, rest, self.continued)
            if more is None:
                return Spans(slice(begin, stop), self._text(answer, rest), ended=True)
            position = more
        return Spans(slice(begin, len(answer)), slice(len(answer), len(answer)), ended=False)

    def split(self, answer: str, *, opened: bool) -> SplitAnswer:
        """Split an answer into thoughts and text, both without white space at their ends (see `spans`)."""
        thoughts, text, ended = self.spans(answer, opened=opened)
        return SplitAnswer(None if thoughts is None else answer[thoughts].strip(), answer[text].strip(), ended)

    def _behind(self, answer: str, position: int, *marks: str | None) -> int | None:
        """Return the offset behind a mark that follows a position, white space aside; None if there is none."""
        position += len(answer[position:]) - len(answer[position:].lstrip())
        return next((position + len(mark) for mark in marks if mark and answer.startswith(mark, position)), None)

    def _text(self, answer: str, position: int) -> slice:
        framed = self._behind(answer, position, *self.text_starts)
        if framed is None:
            return slice(position, len(answer))
        end = answer.find(self.text_end, framed) if self.text_end else -1
        return slice(framed, end if end >= 0 else len(answer))


FORMS = (
    # gpt-oss: each message of an answer names its channel.
    ThoughtMarks(
        start="<|channel|>analysis<|message|>",
        end="<|end|>",
        continued="<|start|>assistant<|channel|>analysis<|message|>",
        text_starts=("<|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>"),
    ),
    ThoughtMarks(start="<|channel>thought\n", end="<channel|>"),  # Gemma 4
    ThoughtMarks(  # Command R7B and later
        start="<|START_THINKING|>",
        end="<|END_THINKING|>",
        text_starts=("<|START_RESPONSE|>", "<|START_TEXT|>"),
        text_end="<|END_RESPONSE|>",
    ),
    ThoughtMarks(start="<|inner_prefix|>", end="<|inner_suffix|>"),  # Apertus
    ThoughtMarks(start="[THINK]", end="[/THINK]"),  # Magistral, Ministral 3
    ThoughtMarks(start="Here are my reasoning steps:\n", end="[BEGIN FINAL RESPONSE]"),  # Apriel
    ThoughtMarks(start="<seed:think>", end="</seed:think>"),  # Seed-OSS
    ThoughtMarks(start="<mm:think>", end="</mm:think>"),  # MiniMax M3
    # Qwen3, QwQ, DeepSeek-R1, SmolLM3, GLM, Nemotron, LFM2.5 and many more; Granite 3.3 marks its text too.
    ThoughtMarks(start="<think>", end="</think>", text_starts=("<response>",), text_end="</response>"),
)
# The control tokens of the forms whose start mark is a control token and a word.
_TOKENS = {"<|end|>": ("<|channel|>", "<|message|>", "<|end|>"), "<channel|>": ("<|channel>", "<channel|>")}


def thought_marks(template: str | None, added_tokens: Iterable[str] = ()) -> ThoughtMarks | None:
    """Return the marks of a model's thoughts, or None if neither its chat template nor its vocabulary shows any.

    `added_tokens` are the texts of the tokenizer's added tokens (`slmops.infra.checkpoints.vocabulary.added_tokens`).
    """
    for marks in FORMS:
        if template and _distinct(marks) in template:
            return marks
    vocabulary = set(added_tokens)
    for marks in FORMS:
        if all(token in vocabulary for token in _TOKENS.get(marks.end, (marks.start, marks.end))):
            return marks.model_copy(update={"shown_by": "vocabulary"})
    return None


def _distinct(marks: ThoughtMarks) -> str:
    """The mark that only templates of this form have: Phi-3's have `<|end|>` too."""
    return marks.start if marks.end == "<|end|>" else marks.end
