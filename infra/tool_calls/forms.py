"""The forms of calls, found by a model's chat template, and what a template does with tools."""

import json
from collections.abc import Sequence

from slmops.infra.checkpoints.chat_template import parse_chat_template
from slmops.infra.records import Json
from slmops.infra.tool_calls import gemma, granite, hermes, llama, mistral, phi4_mini, qwen3_coder
from slmops.infra.tool_calls.call import Form

# In this order, because Qwen3-Coder's templates hold Hermes' mark too, and Granite 4 has Hermes' form.
FORMS = (qwen3_coder.FORM, phi4_mini.FORM, mistral.FORM, gemma.FORM, hermes.FORM, granite.FORM, llama.FORM)


def form_of(template: str) -> Form | None:
    """Return the form of a chat template's calls, or None if it is none that is known."""
    return next((form for form in FORMS if any(mark in template for mark in form.marks)), None)


def takes_tools(template: str) -> bool:
    """Whether a chat template reads `tools`; raises `BadInput` for one that is not Jinja."""
    from jinja2 import nodes

    tree = parse_chat_template(template)
    return any(name.name == "tools" and name.ctx == "load" for name in tree.find_all(nodes.Name))


def takes_tools_in_system_message(template: str) -> bool:
    """Whether a chat template reads the tools, as JSON, from its system message, as Phi-4-mini's does."""
    return "message['tools']" in template or 'message["tools"]' in template


def with_tools_in_system_message(messages: tuple[Json, ...], tools_json: str) -> tuple[Json, ...]:
    """Return a chat whose system message, an empty one if it has none, holds the tools as JSON."""
    system: Json = {"role": "system", "content": ""}
    first, rest = (messages[0], messages[1:]) if messages[0]["role"] == "system" else (system, messages)
    return ({**first, "tools": tools_json}, *rest)


def with_tools_aside(messages: Sequence[Json], tools: Sequence[Json] = ()) -> tuple[Sequence[Json], Sequence[Json]]:
    """Return a chat without the tools in its system message, and the tools: the reverse of the former."""
    within = messages[0].get("tools") if messages else None
    if not isinstance(within, str):
        return messages, tools
    first = {key: value for key, value in messages[0].items() if key != "tools"}
    return (first, *messages[1:]), json.loads(within)
