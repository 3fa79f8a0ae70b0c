"""Granite 3's form: a JSON list of calls behind `<|tool_call|>`, or `<tool_call>` as some answers spell it."""

from slmops.infra.tool_calls.call import AnsweredCalls, Form, Tools, calls_behind


def parse(answer: str, tools: Tools) -> AnsweredCalls:
    """Read the calls of an answer."""
    return calls_behind(answer, "<|tool_call|>", "<tool_call>")


FORM = Form("granite", ("<|start_of_role|>",), parse)
