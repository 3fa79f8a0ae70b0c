"""Calls of tools in the runtime's text, as OpenAI's API has them: whole and in streams cut anywhere."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from slmops.infra.foundry.abilities import Abilities
from slmops.infra.foundry.openai_server.answers import Answer
from slmops.infra.foundry.openai_server.chat_request import ChatRequest
from slmops.infra.foundry.openai_server.errors import Refused
from slmops.infra.foundry.openai_server.tool_answers import answered_calls, streamed_calls
from slmops.infra.foundry.openai_server.tool_use import ToolUse, tool_use
from slmops.infra.foundry.served_model import PlacedModel
from slmops.infra.tool_calls.forms import FORMS

FORM = {form.name: form for form in FORMS}
HERMES, GEMMA = (Abilities(takes_tools=True, form=FORM[name]) for name in ("hermes", "gemma"))
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]
ASKED = {"model": "home", "messages": [{"role": "user", "content": "hello"}], "tools": TOOLS}
CALLS = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n'
MADE = [("f", {"a": 1}), ("g", {})]


def used(form: str = "hermes", **more: Any) -> ToolUse:
    placed = PlacedModel(0, ("<|im_end|>",), Abilities(takes_tools=True, form=FORM[form]))
    found = tool_use(ChatRequest.model_validate_json(json.dumps({**ASKED, **more})), placed)
    assert found
    return found


def whole(text: str, use: ToolUse, finish_reason: str = "stop") -> tuple[str | None, list[Any], str]:
    message = {"role": "assistant", "content": text}
    document = {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}
    (choice,) = json.loads(answered_calls(json.dumps(document).encode(), use))["choices"]
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    made = [(call["name"], json.loads(call["arguments"])) for call in calls]
    return choice["message"]["content"], made, choice["finish_reason"]


def streamed(pieces: list[str], use: ToolUse, finish_reason: str = "stop") -> tuple[str, list[Any], str]:
    deltas = [({"content": piece}, None) for piece in pieces] + [({}, finish_reason)]
    texts = [{"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} for delta, reason in deltas]

    async def events() -> AsyncIterator[bytes]:
        for text in texts:
            yield f"data: {json.dumps(text)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async def collected() -> list[bytes]:
        answer = streamed_calls(Answer(httpx.Response(200), b"", events()), use)
        assert answer.events
        return [event async for event in answer.events]

    *chunks, done = asyncio.run(collected())
    assert done == b"data: [DONE]\n\n"
    content, calls, reason = "", list[list[str]](), ""
    for chunk in chunks:
        (choice,) = json.loads(chunk.removeprefix(b"data: "))["choices"]
        content += choice["delta"].get("content", "")
        reason = choice["finish_reason"] or reason
        for call in choice["delta"].get("tool_calls", []):
            if call["index"] == len(calls):
                assert call["type"] == "function"
                assert call["id"].isalnum()
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"]["arguments"]
    return content, [(name, json.loads(arguments)) for name, arguments in calls], reason


def test_an_answer_has_its_calls_and_the_text_before_them() -> None:
    assert whole(f"One moment.\n{CALLS}", used()) == ("One moment.", MADE, "tool_calls")
    assert whole(CALLS, used()) == (None, MADE, "tool_calls")
    assert whole("It is < 5.", used()) == ("It is < 5.", [], "stop")


def test_a_stream_cut_anywhere_has_the_same_calls_and_text() -> None:
    text = f"It is <b>hot</b>.\n{CALLS}"
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert streamed(pieces, used()) == ("It is <b>hot</b>.", MADE, "tool_calls")
    assert streamed(["a <", "tool", " b "], used()) == ("a <tool b ", [], "stop")
    assert streamed(['{"na', 'me": "f", "parameters": {}}'], used("llama")) == ("", [("f", {})], "tool_calls")
    assert streamed(["1 + ", "{2}"], used("llama")) == ("1 + {2}", [], "stop")


@pytest.mark.parametrize(
    "text", ['<tool_call>\n{"name": "h", "arguments": {}}', '<tool_call>\n{"name": "f", "argum', "<tool_call>"]
)
def test_what_is_no_call_of_an_offered_tool_stays_text(text: str) -> None:
    assert whole(text, used()) == (text, [], "stop")
    assert streamed([text[:5], text[5:]], used()) == (text, [], "stop")


def test_a_required_call_that_was_not_made_is_an_error() -> None:
    required = used(tool_choice="required")
    assert whole(CALLS, required)[1] == MADE
    for read in (lambda: whole("No.", required), lambda: streamed(["No."], required)):
        with pytest.raises(Refused) as refused:
            read()
        assert (refused.value.status, refused.value.error["code"]) == (502, "model_failed")
    assert whole(CALLS[:20], required, "length") == (CALLS[:20], [], "length")
    named = used(tool_choice={"type": "function", "function": {"name": "g"}})
    assert named.callable_names == {"g"}


def test_broken_control_tokens_are_whole_in_arguments() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"code": "<\u200b|im_end|>"}}</tool_call>'
    assert whole(text, used())[1] == [("f", {"code": "<|im_end|>"})]


def test_a_grammar_has_the_model_s_form_tokens_and_schemas() -> None:
    placed = PlacedModel(0, (), Abilities(takes_tools=True, form=FORM["hermes"], tokens={"<tool_call>": 7}))
    body = {**ASKED, "tool_choice": "required", "parallel_tool_calls": False}
    use = tool_use(ChatRequest.model_validate_json(json.dumps(body)), placed)
    assert use
    assert use.sent["tool_choice"] == "none"
    grammar = use.sent["response_format"]
    assert isinstance(grammar, dict)
    text = str(grammar["lark_grammar"])
    assert text.startswith('start: calls\ncalls: call\ncall: <[7]> "\\n"? (call0 | call1) "\\n"? "</tool_call>"')
    assert 'call1: "{\\"name\\":" " "? "\\"g\\"," " "? "\\"arguments\\":" " "? (spacedcall1 | compactcall1) "}"' in text
    assert "response_format" not in used().sent


@pytest.mark.parametrize(
    ("abilities", "more", "param"),
    [
        (Abilities(), {}, "tools"),
        (Abilities(takes_tools=True), {}, "tools"),
        (GEMMA, {"tool_choice": "required"}, "tool_choice"),
        (GEMMA, {"parallel_tool_calls": False}, "parallel_tool_calls"),
        (
            Abilities(takes_tools=True, form=FORM["hermes"]),
            {"response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(abilities: Abilities, more: dict[str, Any], param: str) -> None:
    placed = replace(PlacedModel(0, ()), abilities=abilities)
    asked = ChatRequest.model_validate_json(json.dumps({**ASKED, **more}))
    with pytest.raises(Refused) as refused:
        tool_use(asked, placed)
    assert (refused.value.status, refused.value.error["param"]) == (400, param)
    assert tool_use(asked.model_copy(update={"tool_choice": "none"}), placed) is None
