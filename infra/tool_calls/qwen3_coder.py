"""Qwen3-Coder's form: `<function=NAME>` with elements `<parameter=KEY>`, whose text has the type of the schema."""

import json
import re

from pydantic import JsonValue

from slmops.infra.tool_calls.call import AnsweredCalls, Form, ToolCall, Tools

_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PYTHON = {"True": True, "False": False, "None": None}


def parse(answer: str, tools: Tools) -> AnsweredCalls:
    """Read the calls of an answer."""
    calls = [
        ToolCall(
            name=name,
            arguments={key: _value(text, _types(tools, name, key)) for key, text in _PARAMETER.findall(content)},
        )
        for name, content in _FUNCTION.findall(answer)
    ]
    return AnsweredCalls(calls=tuple(calls), malformed=max(0, answer.count("<function=") - len(calls)))


def _types(tools: Tools, name: str, key: str) -> list[object]:
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or function.get("name") != name:
            continue
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        schema = properties.get(key) if isinstance(properties, dict) else None
        types = schema.get("type") if isinstance(schema, dict) else None
        return list(types) if isinstance(types, list) else [types]
    return [None]


def _value(text: str, types: list[object]) -> JsonValue:
    if types == ["string"]:
        return text
    if text.strip() in _PYTHON:
        return _PYTHON[text.strip()]
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value


FORM = Form("qwen3_coder", ("<function=",), parse, openings=("<tool_call>", "<function="))
