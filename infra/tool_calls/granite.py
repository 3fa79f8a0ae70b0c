"""Granite 3's form: a JSON list of calls behind `<|tool_call|>`, or `<tool_call>` as some answers spell it."""

from slmops.infra.tool_calls.call import AnsweredCalls, Form, Frame, Tools, calls_behind

_OPENINGS = ("<|tool_call|>", "<tool_call>")


def parse(answer: str, tools: Tools) -> AnsweredCalls:
    """Read the calls of an answer."""
    return calls_behind(answer, *_OPENINGS)


FORM = Form(
    "granite",
    ("<|start_of_role|>",),
    parse,
    openings=_OPENINGS,
    frame=Frame(opening="<|tool_call|>", is_list=True, between=", "),
)
