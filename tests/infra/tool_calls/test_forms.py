"""The forms in which families write calls of tools; the cases are data in cases.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.tool_calls.forms import FORMS, form_of, takes_tools
from tests.support.real_models import real_model
from tests.tasks.chat_templates import TEMPLATES

CASES = json.loads(Path(__file__).with_name("cases.json").read_text("utf-8"))
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"text": {"type": "string"}}}}}
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['form']}-{case['answer'][:24]}")
def test_calls_are_read_in_each_form(case: dict[str, Any]) -> None:
    (form,) = [form for form in FORMS if form.name == case["form"]]
    found = form.parse(case["answer"], TOOLS)
    assert [[call.name, call.arguments] for call in found.calls] == case["calls"]
    assert found.malformed == case.get("malformed", 0)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_no_answer_breaks_a_parser(form: Any) -> None:
    marks = [*form.marks, "<|tool_call|>", "<|python_tag|>"]
    for mark in marks:
        for text in ("", "[" * 5000, '{"name": 1}', '[{"name": "f", "arguments": []}]', "f.call(*a)", "call:f{a:,}"):
            assert form.parse(mark + text, TOOLS).calls == ()


def test_the_form_is_found_by_the_template() -> None:
    qwen3 = read_chat_template(real_model("tokenizers/qwen3")) or ""
    assert takes_tools(qwen3)
    assert (form_of(qwen3) or FORMS[0]).name == "hermes"
    plain = (TEMPLATES / "chatml.jinja").read_text("utf-8")
    assert not takes_tools(plain)
    assert form_of(plain) is None
