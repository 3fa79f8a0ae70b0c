"""Llama 3.1's form: JSON with `parameters` as the whole answer, or behind `<|python_tag|>`, where also
`name.call(key=value)` calls a built-in tool. Calls in parallel are separated by semicolons.
"""

import ast
import re

from slmops.infra.tool_calls.call import (
    MALFORMED,
    AnsweredCalls,
    Form,
    Frame,
    ToolCall,
    Tools,
    calls_of_json,
    read_json_at,
)

_TAG = "<|python_tag|>"
_BUILT_IN = re.compile(r"([\w-]+)\.call(\(.*\))", re.DOTALL)


def parse(answer: str, tools: Tools) -> AnsweredCalls:
    """Read the calls of an answer; JSON that has no `name` is an ordinary answer."""
    _, tag, text = answer.rpartition(_TAG)
    text = text.strip()
    if tag and (called := _BUILT_IN.fullmatch(text)):
        return _built_in(called[1], called[2])
    found, position = AnsweredCalls(), 0
    while position < len(text):
        try:
            value, position = read_json_at(text, position)
        except ValueError:
            return found + MALFORMED if tag or found.calls else found
        calls = calls_of_json(value)
        if not tag and not calls.calls:
            return found
        found += calls
        position += len(text[position:]) - len(text[position:].lstrip("; \t\r\n"))
    return found


def _built_in(name: str, arguments: str) -> AnsweredCalls:
    try:
        called = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(called, ast.Call) or called.args:
            return MALFORMED
        given = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in called.keywords}
        return AnsweredCalls(calls=(ToolCall(name=name, arguments=given),))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return MALFORMED


FORM = Form(
    "llama",
    ('"parameters": dictionary of argument name', _TAG),
    parse,
    openings=(_TAG, "{"),
    frame=Frame(arguments="parameters", between="; "),
)
