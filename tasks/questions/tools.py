"""The tools of an evaluation row, as OpenAI's API describes them, and its calls of them."""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StrictStr, field_validator

from slmops.infra.records import Json, Record, later_field
from slmops.infra.tool_calls.call import ToolCall
from slmops.tasks.questions.messages import ToolMessage, arguments_of
from slmops.tasks.questions.output_format import OutputFormat, check_schema, output_faults


class Function(Record):
    """A function that a model may call; `parameters` is the JSON Schema of its arguments."""

    name: StrictStr = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: StrictStr | None = later_field(None)
    parameters: Json | None = later_field(None)
    strict: bool | None = later_field(None)

    @field_validator("parameters")
    @classmethod
    def _is_schema(cls, parameters: Json | None) -> Json | None:
        if parameters is None:
            return None
        check_schema(parameters)
        if parameters.get("type", "object") != "object":
            raise ValueError(f"its type must be object, found {parameters['type']!r}")
        return parameters


class Tool(Record):
    """An offered tool, as OpenAI's API describes it."""

    type: Literal["function"]
    function: Function


class ExpectedCall(ToolCall):
    """A call that an answer should make."""

    arguments: Annotated[Json, BeforeValidator(arguments_of)]


def check_tools(tools: Sequence[Tool]) -> None:
    """Raise `ValueError` if two tools have one name."""
    names = [tool.function.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tools have the name {name!r}")


def check_calls(messages: Sequence[ToolMessage], tools: Sequence[Tool]) -> None:
    """Raise `ValueError` for a call to a tool that is not offered, and for calls and results that do not pair."""
    waiting: list[str | None] = []
    for message in messages:
        if message.role == "tool":
            _take_result(waiting, message)
            continue
        if waiting:
            raise ValueError("a call of an assistant's message has no result: a message of the role tool must follow")
        waiting = [call.id for call in message.tool_calls]
        check_offered((call.function.name for call in message.tool_calls), tools)
    if waiting:
        raise ValueError("the last call has no result: a message of the role tool must follow")


def _take_result(waiting: list[str | None], message: ToolMessage) -> None:
    if not waiting:
        raise ValueError("a message of the role tool has no call before it that waits for a result")
    named = message.tool_call_id if any(waiting) else None
    if named is not None and named not in waiting:
        raise ValueError(f"a message of the role tool answers the call {named!r}, which is none of those before it")
    waiting.remove(waiting[0] if named is None else named)


def check_offered(names: Iterable[str], tools: Sequence[Tool]) -> None:
    """Raise `ValueError` for the name of a tool that is not offered."""
    offered = [tool.function.name for tool in tools]
    for name in names:
        if name not in offered:
            raise ValueError(f"the tool {name!r} is called, and `tools` offers {', '.join(offered) or 'none'}")


def check_expected(expected: Sequence[ToolCall], tools: Sequence[Tool]) -> None:
    """Raise `ValueError` for expected calls without tools, to a tool that is not offered, or against its schema."""
    if not tools:
        raise ValueError("`expected_tool_calls` needs `tools`, those of the row or of the file")
    check_offered((call.name for call in expected), tools)
    schemas = {tool.function.name: tool.function.parameters for tool in tools}
    for call in expected:
        (fault,) = output_faults(OutputFormat(json_schema=schemas[call.name] or {}), [json.dumps(call.arguments)])
        if fault is not None:
            raise ValueError(f"the expected call of {call.name!r} does not fit the tool's schema: {fault}")


def shown_calls(calls: Iterable[ToolCall]) -> str:
    """Return calls as text, for a reader: one a line."""
    return "\n".join(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in calls) or "(no call)"
