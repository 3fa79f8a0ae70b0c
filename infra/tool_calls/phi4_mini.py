"""Phi-4-mini's form: a JSON list of calls behind `<|tool_call|>` or the word `functools`."""

from slmops.infra.tool_calls.call import AnsweredCalls, Form, Tools, calls_behind

_OPENINGS = ("<|tool_call|>", "functools")


def parse(answer: str, tools: Tools) -> AnsweredCalls:
    """Read the calls of an answer."""
    return calls_behind(answer, *_OPENINGS)


FORM = Form("phi4_mini", ("<|tool|>",), parse, openings=_OPENINGS)
