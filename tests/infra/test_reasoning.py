"""Thoughts in the chat templates of the Hub, and in answers; the templates' facts are data in reasoning_cases.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.checkpoints.chat_template import template_environment
from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.checkpoints.thinking_switch import thinking_switch
from slmops.infra.checkpoints.vocabulary import added_tokens
from slmops.infra.reasoning import FORMS, SplitAnswer, ThoughtMarks, thought_marks
from tests.support.real_models import real_model

CASES = json.loads(Path(__file__).with_name("reasoning_cases.json").read_text("utf-8"))
THINK, CHANNELS, COHERE = FORMS[-1], FORMS[0], FORMS[2]


def template_of(name: str) -> str:
    return (real_model("llama-cpp-models") / "templates" / f"{name}.jinja").read_text("utf-8")


def prompt_of(template: str) -> str:
    chat = [{"role": "user", "content": "Is it <think> or </think>?"}]
    known = {"messages": chat, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    return template_environment().from_string(template).render(known, tools=None, documents=None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["template"])
def test_the_template_shows_the_marks_and_the_switch(case: dict[str, Any]) -> None:
    template = template_of(case["template"])
    marks, switch = thought_marks(template), thinking_switch(template)
    assert marks
    assert (marks.end, marks.shown_by, switch and switch.variable) == (case["end"], "template", case["switch"])
    assert marks.is_opened_by(prompt_of(template)) == case["opened"]
    if switch:
        on, off = (prompt_of(switch.prefix(thinks=thinks) + template) for thinks in (True, False))
        assert on != off
        assert (marks.is_opened_by(on), marks.is_opened_by(off)) == (case["opened_on"], False)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen2.5-7B-Instruct",
        "meta-llama-Llama-3.1-8B-Instruct",
        "microsoft-Phi-3.5-mini-instruct",
        "ibm-granite-granite-4.0",
        "google-gemma-2-2b-it",
        "Mistral-Small-3.2-24B-Instruct-2506",
    ],
)
def test_other_templates_show_none(name: str) -> None:
    assert (thought_marks(template_of(name)), thinking_switch(template_of(name))) == (None, None)


def test_a_vocabulary_shows_marks_where_no_template_does() -> None:
    qwen3, gpt_oss, phi3 = (real_model(f"tokenizers/{name}") for name in ("qwen3", "gptoss", "phi-3"))
    assert (found := thought_marks(read_chat_template(qwen3), added_tokens(qwen3)))
    assert (found.end, found.shown_by) == ("</think>", "template")
    for folder, end in ((qwen3, "</think>"), (gpt_oss, "<|end|>")):
        found = thought_marks("{{ messages }}", added_tokens(folder))
        assert (found and found.end, found and found.shown_by) == (end, "vocabulary")
    assert thought_marks(None, added_tokens(phi3)) is None
    assert thought_marks(None) is None


@pytest.mark.parametrize(
    ("marks", "opened", "answer", "thoughts", "text", "ended"),
    [
        (THINK, False, "<think>\nA lamp.\n</think>\n\nDone.", "A lamp.", "Done.", True),
        (THINK, False, " \n<think></think>Done.", "", "Done.", True),
        (THINK, False, "Done.", None, "Done.", True),
        (THINK, False, "Done with </think>.", None, "Done with </think>.", True),
        (THINK, False, "Write <think>x</think>.", None, "Write <think>x</think>.", True),
        (THINK, False, "<think>a</think>Use </think>.", "a", "Use </think>.", True),
        (THINK, False, "<think>a</think><think>b", "a", "<think>b", True),
        (THINK, False, "<think>A lam", "A lam", "", False),
        (THINK, True, "A lamp.\n</think>\n\nDone.", "A lamp.", "Done.", True),
        (THINK, True, "<think>\nA lamp.</think>Done.", "A lamp.", "Done.", True),
        (THINK, True, "A lam", "A lam", "", False),
        (THINK, True, "", "", "", False),
        (THINK, False, "<think>a</think><response>Done.</response>", "a", "Done.", True),
        (THINK, False, "<think>a</think>\n<response>Do", "a", "Do", True),
        (
            CHANNELS,
            False,
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Done.",
            "a<|end|><|start|>assistant<|channel|>analysis<|message|>b",
            "Done.",
            True,
        ),
        (CHANNELS, False, "<|channel|>final<|message|>Done.", None, "Done.", True),
        (CHANNELS, False, "<|channel|>analysis<|message|>a", "a", "", False),
        (
            COHERE,
            False,
            "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>Done.<|END_RESPONSE|>",
            "a",
            "Done.",
            True,
        ),
    ],
)
def test_an_answer_is_split(
    marks: ThoughtMarks, opened: bool, answer: str, thoughts: str | None, text: str, ended: bool
) -> None:
    assert marks.split(answer, opened=opened) == SplitAnswer(thoughts, text, ended)
