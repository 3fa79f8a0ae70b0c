"""What a model's chat template makes of rows with tools: their prompts, and the form of the calls in its answers."""

import json
from collections.abc import Sequence

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


def prompt_of(row: EvaluationRow, template: str | None) -> tuple[tuple[Message, ...], tuple[Json, ...]]:
    """Return the messages and tools that a chat template is given for a row."""
    messages = tuple(message.model_dump() for message in row.messages)
    tools = tuple(tool.model_dump(mode="json") for tool in row.tools)
    if tools and not takes_tools(template or "") and takes_tools_in_system_message(template or ""):
        return with_tools_in_system_message(messages, json.dumps(tools)), ()
    return messages, tools
