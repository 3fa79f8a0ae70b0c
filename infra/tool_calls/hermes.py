"""Hermes' form, of Qwen2.5, Qwen3, SmolLM3 and Granite 4: a call is JSON between `<tool_call>` and `</tool_call>`."""

from slmops.infra.tool_calls.call import AnsweredCalls, Form, Frame, Tools, calls_behind


def parse(answer: str, tools: Tools) -> AnsweredCalls:
    """Read the calls of an answer."""
    return calls_behind(answer, "<tool_call>")


FORM = Form(
    "hermes",
    ("<tool_call>",),
    parse,
    openings=("<tool_call>",),
    frame=Frame(opening="<tool_call>", before="\n", after="\n", closing="</tool_call>"),
)
