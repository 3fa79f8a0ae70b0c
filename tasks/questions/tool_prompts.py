"""What a model's chat template makes of rows: tools, the mode of its thoughts, and the form of calls in its answers."""

import json
from collections.abc import Sequence

from slmops.infra.checkpoints.thinking_switch import thinking_switch
from slmops.infra.errors import BadInput
from slmops.infra.records import Json
from slmops.infra.reference.answers import Message
from slmops.infra.tool_calls.call import Form
from slmops.infra.tool_calls.forms import (
    FORMS,
    form_of,
    takes_tools,
    takes_tools_in_system_message,
    with_tools_in_system_message,
)
from slmops.tasks.questions.evaluation_set import EvaluationRow


def form_for(template: str | None, rows: Sequence[EvaluationRow]) -> Form | None:
    """Return the form of the calls in answers to rows; None if no row has tools.

    Raises `BadInput` for a template that writes no tools, and for one whose calls have no known form.
    """
    first = next((row for row in rows if row.tools), None)
    if first is None:
        return None
    template = template or ""
    if not (takes_tools(template) or takes_tools_in_system_message(template)):
        raise BadInput(
            f"Row {first.id!r} has tools, and the model's chat template does not read `tools`.",
            "Leave out the rows with tools, or give the template that the model was trained with (--chat-template).",
            code="template-without-tools",
        )
    form = form_of(template)
    if form is None:
        known = ", ".join(form.name for form in FORMS)
        raise BadInput(
            f"Row {first.id!r} has tools, and the chat template shows no known form of calls ({known}).",
            "Leave out the rows with tools, or give the template that the model was trained with (--chat-template).",
            code="tool-calls-of-unknown-form",
        )
    return form


def check_switch(template: str | None, rows: Sequence[EvaluationRow]) -> None:
    """Raise `BadInput` for a row that turns thoughts on or off, if the chat template has no switch."""
    first = next((row for row in rows if row.enable_thinking is not None), None)
    if first is not None and thinking_switch(template) is None:
        raise BadInput(
            f"Row {first.id!r} turns thoughts on or off, and the model's chat template has no switch for them.",
            "Leave out `enable_thinking` and --thinking, or give the template that the model was trained with "
            "(--chat-template).",
            code="template-without-switch",
        )


def template_prefix_of(row: EvaluationRow, template: str | None) -> str:
    """Return Jinja that, before the chat template, turns thoughts on or off as the row asks."""
    switch = None if row.enable_thinking is None else thinking_switch(template)
    return switch.prefix(thinks=bool(row.enable_thinking)) if switch else ""


def prompt_of(row: EvaluationRow, template: str | None) -> tuple[tuple[Message, ...], tuple[Json, ...]]:
    """Return the messages and tools that a chat template is given for a row."""
    messages = tuple(message.model_dump() for message in row.messages)
    tools = tuple(tool.model_dump(mode="json") for tool in row.tools)
    if tools and not takes_tools(template or "") and takes_tools_in_system_message(template or ""):
        return with_tools_in_system_message(messages, json.dumps(tools)), ()
    return messages, tools
