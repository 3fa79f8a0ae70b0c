"""Grammars that keep an answer to calls of tools in a model's own form, in llguidance's dialect of Lark.

The arguments of a call follow the JSON Schema of its tool. A mark that is one token of the model is that token in the
grammar, because text does not match control tokens.
"""

import json
from collections.abc import Mapping, Sequence

from slmops.infra.reasoning import ThoughtMarks
from slmops.infra.records import Json
from slmops.infra.tool_calls.call import Frame

# A model writes JSON as it was trained: with single spaces or without. With any white space, an answer might never end.
_JSON_STYLES = (
    {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
)
_SPACE = '" "?'
_BLANK = r"/[ \t\r\n]*/"


class CallGrammar:
    """Builds grammars for a frame; `tokens` are the model's added tokens: text to id."""

    def __init__(self, frame: Frame, tokens: Mapping[str, int]) -> None:
        self._frame = frame
        self._tokens = tokens

    def required(self, tools: Sequence[Json], *, parallel: bool, marks: ThoughtMarks | None, opened: bool) -> str:
        """Return the grammar of an answer that calls one of these tools, or several `parallel`.

        Thoughts may come before, between a model's `marks`; `opened` says that the prompt has the start mark.
        """
        rules = [*self._calls(tools, parallel=parallel)]
        if marks is None:
            return "\n".join(["start: calls", *rules])
        start = "" if opened else self._mark(marks.start)
        thoughts = [f"thoughts: {start} THOUGHTS {self._mark(marks.end)} {_BLANK}", _without("THOUGHTS", marks.end)]
        return "\n".join(["start: calls | thoughts calls", *thoughts, *rules])

    def optional(self, tools: Sequence[Json], *, parallel: bool) -> str:
        """Return the grammar of any text, which calls of these tools may follow."""
        if not self._frame.opening:  # a call is the whole answer
            text = ["start: TEXT | calls", r"TEXT: /[^{](?s:.*)/"]
        else:
            text = ["start: TEXT | TEXT? calls", _without("TEXT", self._frame.opening)]
        return "\n".join([*text, *self._calls(tools, parallel=parallel)])

    def _calls(self, tools: Sequence[Json], *, parallel: bool) -> list[str]:
        frame = self._frame
        more = f" ({json.dumps(frame.between)} call)*" if parallel else ""
        if frame.is_list:
            rules = [f'calls: {self._mark(frame.opening)} "[" call{more} "]" {self._mark(frame.closing)}']
            before = after = ""
        else:
            rules = [f"calls: call{more}"]
            before = f"{self._mark(frame.opening)} {_optional(frame.before)}"
            after = f"{_optional(frame.after)} {self._mark(frame.closing)}"
        named = [f"call{number}" for number in range(len(tools))]
        rules.append(f"call: {before} ({' | '.join(named)}) {after}")
        for rule, tool in zip(named, tools, strict=True):
            rules += self._call(rule, tool)
        return rules

    def _call(self, rule: str, tool: Json) -> list[str]:
        function = tool["function"]
        assert isinstance(function, dict)
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        assert isinstance(schema, dict)
        named = ['{"name":', f"{json.dumps(function['name'])},", f'"{self._frame.arguments}":', ""]
        head = f" {_SPACE} ".join(_text(part) for part in named).strip()
        styled = [json.dumps({"type": "object", **schema, "x-guidance": style}) for style in _JSON_STYLES]
        return [
            f'{rule}: {head} (spaced{rule} | compact{rule}) "}}"',
            *(f"{name}{rule}: %json {text}" for name, text in zip(("spaced", "compact"), styled, strict=True)),
        ]

    def _mark(self, mark: str) -> str:
        return f"<[{self._tokens[mark]}]>" if mark in self._tokens else _text(mark)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _optional(blank: str) -> str:
    """Return the text that a form writes around its calls; where it is blank, a model may leave it out."""
    return f"{_text(blank)}?" if blank and not blank.strip() else _text(blank)


def _without(rule: str, mark: str) -> str:
    """Return the rule of any text that does not hold a mark."""
    escaped = "".join(f"\\{sign}" if sign in r"\.+*?()[]{}|^$/-" else sign for sign in mark)
    return rf"{rule}: /(?s:.+)/ & ~/(?s:.*){escaped}(?s:.*)/"
