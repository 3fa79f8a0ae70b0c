"""Thoughts in tokens, by real tokenizers: marks of one token, of several, and control tokens."""

import pytest
from tokenizers import Tokenizer

from slmops.infra.reasoning import FORMS, ThoughtMarks
from slmops.infra.reference.answers import Thoughts
from slmops.infra.reference.thinking import Thinking, TokenCounter, split_tokens
from tests.support.real_models import real_model

THINK, CHANNELS = FORMS[-1], FORMS[0]
OF_CHANNELS = (
    "<|channel|>analysis<|message|>A lamp? Größe.<|end|><|start|>assistant<|channel|>final<|message|>It is on."
)


@pytest.fixture(params=["qwen3", "starcoder", "gptoss"], scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.from_file(str(real_model(f"tokenizers/{request.param}") / "tokenizer.json"))


def whole(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("opened", [False, True])
def test_an_answer_is_split_by_its_tokens(tokenizer: Tokenizer, opened: bool) -> None:
    text = ("" if opened else "<think>") + "\nA lamp? Größe 東京.\n</think>\n\nIt is on, 東京."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    parts = split_tokens(
        THINK, ids, opened=opened, whole=lambda ids: whole(tokenizer, ids), shown=lambda ids: shown(tokenizer, ids)
    )
    assert parts.record == Thoughts(text="A lamp? Größe 東京.", tokens=parts.tokens, ended=True)
    assert parts.text.strip() == "It is on, 東京."
    assert "</think>" in whole(tokenizer, ids[: parts.tokens])
    assert "</think>" not in whole(tokenizer, ids[: parts.tokens - 1])


def test_control_tokens_mark_thoughts_and_are_not_shown() -> None:
    gpt_oss = Tokenizer.from_file(str(real_model("tokenizers/gptoss") / "tokenizer.json"))
    ids = gpt_oss.encode(OF_CHANNELS, add_special_tokens=False).ids
    parts = split_tokens(
        CHANNELS, ids, opened=False, whole=lambda ids: whole(gpt_oss, ids), shown=lambda ids: shown(gpt_oss, ids)
    )
    assert (parts.thoughts, parts.text, parts.ended) == ("A lamp? Größe.", "It is on.", True)


@pytest.mark.parametrize(
    ("marks", "answer", "opened", "max_thoughts", "max_text", "counted"),
    [
        (THINK, "<think>\nA lamp.\n</think>\n\nIt is on, and stays on.", False, 99, 4, "</think>"),
        (THINK, "A lamp.\n</think>\n\nIt is on, and stays on.", True, 99, 4, "</think>"),
        (THINK, "<think>\nA lamp, a lamp, a lamp, a lamp, a lamp", False, 9, 99, None),
        (THINK, "It is on, and stays on as <think> long </think> as you want.", False, 1, 5, ""),
        (CHANNELS, OF_CHANNELS, False, 99, 8, "<|end|>"),
    ],
)
def test_thoughts_and_text_have_limits_of_their_own(
    tokenizer: Tokenizer, marks: ThoughtMarks, answer: str, opened: bool, max_thoughts: int, max_text: int, counted: str
) -> None:
    """`counted` is the text whose end begins the limit of the text; None: the answer ends at the limit of thoughts."""
    thinking = Thinking(marks=marks, max_tokens=max_thoughts)
    counter = TokenCounter(thinking, max_text, lambda ids: whole(tokenizer, list(ids)), opened=opened)
    ids = tokenizer.encode(answer, add_special_tokens=False).ids
    stopped = next(number for number, token in enumerate(ids, 1) if counter.add(token))
    assert counter.tokens == stopped
    if counted is None:
        assert stopped == max_thoughts
    else:
        before = next(n for n in range(len(ids)) if counted in whole(tokenizer, ids[:n]))
        assert stopped == before + max_text
