"""A call to a tool, and its reading from JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slmops.infra.records import Json, Record

Tools = Sequence[Json]  # OpenAI's `tools`: objects of `type` and `function`


class ToolCall(Record):
    """A call to one tool."""

    name: str
    arguments: Json


class AnsweredCalls(Record):
    """The calls of an answer, in its order, and the number of attempts that are no readable call."""

    calls: tuple[ToolCall, ...] = ()
    malformed: int = 0

    def __add__(self, other: "AnsweredCalls") -> "AnsweredCalls":
        return AnsweredCalls(calls=self.calls + other.calls, malformed=self.malformed + other.malformed)


MALFORMED = AnsweredCalls(malformed=1)


@dataclass(frozen=True)
class Frame:
    """What a form writes around the JSON of its calls.

    `before` and `after` enclose each call, or the list of all calls where `is_list`; `between` separates calls.
    `opening` and `closing` are the outermost marks, which may be control tokens. `arguments` is the key of a call's
    arguments.
    """

    opening: str = ""
    before: str = ""
    after: str = ""
    closing: str = ""
    between: str = "\n"
    is_list: bool = False
    arguments: str = "arguments"


@dataclass(frozen=True)
class Form:
    """How a family of models writes its calls: `marks` are texts of which its chat templates hold one.

    A part of an answer that may be a call begins with one of the `openings`; without any, the whole answer may be one,
    if it begins with a brace. `frame` is None for a form whose calls are no JSON.
    """

    name: str
    marks: tuple[str, ...]
    parse: Callable[[str, Tools], AnsweredCalls]
    openings: tuple[str, ...]
    frame: Frame | None = None


def calls_of_json(value: object) -> AnsweredCalls:
    """Read a call or a list of calls: objects of `name` and `arguments` (or `parameters`, as Llama has it)."""
    found = AnsweredCalls()
    for entry in value if isinstance(value, list) else [value]:
        found += _call_of(entry)
    return found


def read_json_at(text: str, start: int) -> tuple[object, int]:
    """Return the JSON value that begins at an index, after white space, and the index behind it.

    Raises `ValueError` where there is none, and for NaN and Infinity, which are no JSON.
    """
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return json.JSONDecoder(parse_constant=_refuse).raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deep") from None


def calls_behind(answer: str, *marks: str) -> AnsweredCalls:
    """Read the JSON behind each of the first of these marks that an answer holds."""
    mark = next((mark for mark in marks if mark in answer), None)
    found, position = AnsweredCalls(), 0
    while mark and (start := answer.find(mark, position)) >= 0:
        position = start + len(mark)
        try:
            value, position = read_json_at(answer, position)
        except ValueError:
            found += MALFORMED
        else:
            found += calls_of_json(value)
    return found


def _call_of(entry: object) -> AnsweredCalls:
    if not isinstance(entry, dict):
        return MALFORMED
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):  # OpenAI's form has JSON in a string
        try:
            arguments, _ = read_json_at(arguments, 0)
        except ValueError:
            return MALFORMED
    if not isinstance(entry.get("name"), str) or not isinstance(arguments, dict):
        return MALFORMED
    return AnsweredCalls(calls=(ToolCall(name=entry["name"], arguments=arguments),))


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")
