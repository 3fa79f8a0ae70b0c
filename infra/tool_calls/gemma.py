"""FunctionGemma's form: `call:NAME{key:value,...}` between control tokens, with strings between `<escape>` tokens."""

import contextlib
import math
import re

from pydantic import JsonValue

from slmops.infra.tool_calls.call import MALFORMED, AnsweredCalls, Form, ToolCall, Tools

_START = "<start_function_call>"
_NAME = re.compile(r"\s*call:([\w.-]+)\s*(?=\{)")
_PART = re.compile(r"\s*(?:<escape>(?P<text>.*?)<escape>|(?P<bare>[^\s{}\[\],:<]+)|(?P<sign>[{}\[\],:]))", re.DOTALL)
_WORDS = {"true": True, "false": False, "null": None}


def parse(answer: str, tools: Tools) -> AnsweredCalls:
    """Read the calls of an answer."""
    found, position = AnsweredCalls(), 0
    while (start := answer.find(_START, position)) >= 0:
        position = start + len(_START)
        named = _NAME.match(answer, position)
        try:
            arguments = _Reader(answer, named.end()).value() if named else None
        except (ValueError, RecursionError):
            arguments = None
        if named and isinstance(arguments, dict):
            found += AnsweredCalls(calls=(ToolCall(name=named[1], arguments=arguments),))
        else:
            found += MALFORMED
    return found


class _Reader:
    """Reads one value from a position on; raises `ValueError` where the text is none."""

    def __init__(self, text: str, position: int) -> None:
        self._text, self._position = text, position

    def value(self) -> JsonValue:
        part = self._next()
        if part["text"] is not None:
            return str(part["text"])
        if part["bare"] is not None:
            return _bare(part["bare"])
        if part["sign"] == "{":
            return dict(self._members())
        if part["sign"] == "[":
            return list(self._entries())
        raise ValueError(f"{part['sign']} begins no value")

    def _members(self) -> list[tuple[str, JsonValue]]:
        members: list[tuple[str, JsonValue]] = []
        while not self._closes("}", first=not members):
            key = self._next()
            if self._next()["sign"] != ":":
                raise ValueError("a key without a value")
            members.append((key["text"] or key["bare"] or "", self.value()))
        return members

    def _entries(self) -> list[JsonValue]:
        entries: list[JsonValue] = []
        while not self._closes("]", first=not entries):
            entries.append(self.value())
        return entries

    def _closes(self, sign: str, *, first: bool) -> bool:
        """Take the sign that ends a list of things, or the comma before the next of them."""
        before = self._position
        found = self._next()["sign"]
        if found == sign:
            return True
        if first:
            self._position = before
        elif found != ",":
            raise ValueError("a comma is missing")
        return False

    def _next(self) -> re.Match[str]:
        part = _PART.match(self._text, self._position)
        if part is None:
            raise ValueError("the text ends")
        self._position = part.end()
        return part


def _bare(word: str) -> JsonValue:
    if word in _WORDS:
        return _WORDS[word]
    with contextlib.suppress(ValueError):
        return int(word)
    with contextlib.suppress(ValueError):
        number = float(word)
        return number if math.isfinite(number) else word
    return word


FORM = Form("gemma", (_START,), parse, openings=(_START,))
