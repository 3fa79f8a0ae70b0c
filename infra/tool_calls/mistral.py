"""Mistral's form: behind `[TOOL_CALLS]` a JSON list of calls, or since tokenizer v11 a name and `[ARGS]` with JSON."""

import re

from slmops.infra.tool_calls.call import (
    MALFORMED,
    AnsweredCalls,
    Form,
    Frame,
    Tools,
    calls_behind,
    calls_of_json,
    read_json_at,
)

_MARK = "[TOOL_CALLS]"
_NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?(?=\s*\{)")


def parse(answer: str, tools: Tools) -> AnsweredCalls:
    """Read the calls of an answer."""
    start = answer.find(_MARK)
    if start < 0 or not (named := _NAME.match(answer, start + len(_MARK))):
        return calls_behind(answer, _MARK)
    found = AnsweredCalls()
    while named:
        try:
            arguments, position = read_json_at(answer, named.end())
        except ValueError:
            return found + MALFORMED
        found += calls_of_json({"name": named[1], "arguments": arguments})
        position += len(_MARK) if answer.startswith(_MARK, position) else 0
        named = _NAME.match(answer, position)
    return found


FORM = Form("mistral", (_MARK,), parse, openings=(_MARK,), frame=Frame(opening=_MARK, is_list=True, between=", "))
