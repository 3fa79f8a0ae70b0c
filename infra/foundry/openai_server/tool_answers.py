"""The calls of tools in the runtime's answers, which are text, in OpenAI's form: whole and as events of a stream.

Text that cannot be read as calls of offered tools is passed on as text.
"""

import json
import secrets
import string
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from slmops.infra.foundry.openai_server.answers import DATA, Answer, all_events
from slmops.infra.foundry.openai_server.errors import Refused
from slmops.infra.foundry.openai_server.requests import whole
from slmops.infra.foundry.openai_server.tool_use import ToolUse
from slmops.infra.records import Json
from slmops.infra.tool_calls.call import Form, ToolCall

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # Mistral's chat templates accept no other


def answered_calls(content: bytes, use: ToolUse) -> bytes:
    """Return a chat completion with the calls of its text; raises `Refused` if a required one was not made."""
    document: Any = json.loads(content)
    for choice in document["choices"]:
        message = choice["message"]
        text = message.get("content") or ""
        start = possible_start(text, use.form)
        calls = _calls_of(text[start:], use)
        if calls:
            message |= {"content": text[:start].strip() or None, "tool_calls": [_call(call, use) for call in calls]}
            choice["finish_reason"] = "tool_calls"
        else:
            _check_required(choice["finish_reason"], use)
    return json.dumps(document, ensure_ascii=False).encode()


def streamed_calls(answer: Answer, use: ToolUse) -> Answer:
    """Return a stream whose text before calls is passed on at once, and whose calls follow when the text has ended."""
    return replace(answer, first=b"", events=_events(all_events(answer), use))


async def _events(events: AsyncIterator[bytes], use: ToolUse) -> AsyncIterator[bytes]:
    held = ""
    async for event in events:
        chunk = _chunk(event)
        if chunk is None:
            yield event
            continue
        choice = chunk["choices"][0]
        held += choice["delta"].pop("content", None) or ""
        start = possible_start(held, use.form)
        if choice["finish_reason"] is None:
            ready, held = held[:start], held[start:]
            if ready or choice["delta"]:
                yield _event(chunk, {**choice["delta"], **({"content": ready} if ready else {})}, None)
            continue
        for delta, finish_reason in _ending(held, choice["finish_reason"], use):
            yield _event(chunk, delta, finish_reason)


def _ending(held: str, finish_reason: str, use: ToolUse) -> list[tuple[Json, str | None]]:
    """Return the last deltas of a stream: its calls, or the text that could have been one."""
    calls = _calls_of(held, use)
    if not calls:
        _check_required(finish_reason, use)
        text: list[tuple[Json, str | None]] = [({"content": held}, None)] if held else []
        return [*text, ({}, finish_reason)]
    deltas: list[tuple[Json, str | None]] = []
    for index, call in enumerate(calls):
        made = _call(call, use)
        function = made["function"]
        assert isinstance(function, dict)
        named = {"index": index, **made, "function": {**function, "arguments": ""}}
        deltas += [
            ({"tool_calls": [named]}, None),
            ({"tool_calls": [{"index": index, "function": {"arguments": function["arguments"]}}]}, None),
        ]
    return [*deltas, ({}, "tool_calls")]


def possible_start(text: str, form: Form) -> int:
    """Return where calls begin in a text, or may begin when more of it comes: its length if nowhere."""
    starts = [len(text)]
    for opening in form.openings:
        if opening == "{":  # a call without a mark is the whole answer
            starts += [0] if text.lstrip()[:1] in ("", "{") else []
            continue
        cut = [length for length in range(1, len(opening)) if text.endswith(opening[:length])]
        found = text.find(opening)
        starts += [found] if found >= 0 else [len(text) - max(cut, default=0)]
    start = min(starts)
    return len(text[:start].rstrip())  # white space before a call is none of the content


def _calls_of(text: str, use: ToolUse) -> Sequence[ToolCall]:
    found = use.form.parse(text, use.tools)
    readable = not found.malformed and all(call.name in use.callable_names for call in found.calls)
    return found.calls if readable else ()


def _call(call: ToolCall, use: ToolUse) -> Json:
    arguments = whole(json.dumps(call.arguments, ensure_ascii=False), use.control_tokens)
    number = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
    return {"id": number, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _check_required(finish_reason: str, use: ToolUse) -> None:
    if use.is_required and finish_reason != "length":
        raise Refused(502, "The model did not make the call that tool_choice requires.", "server_error", "model_failed")


def _chunk(event: bytes) -> Any:
    if not event.startswith(DATA + b"{"):
        return None
    document = json.loads(event.removeprefix(DATA))
    return document if document.get("choices") else None


def _event(chunk: Any, delta: Json, finish_reason: str | None) -> bytes:
    choice = {**chunk["choices"][0], "delta": delta, "finish_reason": finish_reason}
    return (
        DATA + json.dumps({**chunk, "choices": [choice]}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )
