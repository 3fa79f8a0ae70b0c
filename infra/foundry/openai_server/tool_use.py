"""How a request's tools are used: what the runtime is told, and how its answer is read.

The runtime renders the model's chat template with the tools, but its own protocol for calls is not the one that the
model was trained with. So it is asked for text, and the server reads the calls by the model's own form. Where a call
is required or its arguments must follow a schema, a grammar in that form constrains the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from slmops.infra.foundry.openai_server.chat_request import ChatRequest, NamedTool, Tool
from slmops.infra.foundry.openai_server.errors import Refused
from slmops.infra.foundry.served_model import PlacedModel
from slmops.infra.records import Json
from slmops.infra.tool_calls.call import Form
from slmops.infra.tool_calls.grammar import CallGrammar


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request: the model's form of calls, and what the runtime is `sent` for them.

    `callable_names` are the functions of which the answer may call some, or must where `is_required`.
    """

    form: Form
    sent: Json
    tools: tuple[Json, ...]
    callable_names: frozenset[str]
    is_required: bool
    control_tokens: tuple[str, ...]


def tool_use(asked: ChatRequest, placed: PlacedModel) -> ToolUse | None:
    """Return how a request's tools are used; None if it has none, or none may be called.

    Raises `Refused` for what this model cannot do.
    """
    if not asked.tools or asked.tool_choice == "none":
        return None
    form = _form_of(placed)
    if asked.response_format and asked.response_format.type != "text":
        raise Refused(400, "Tools that may be called exclude another response format.", param="response_format")
    named = asked.tool_choice.function.name if isinstance(asked.tool_choice, NamedTool) else None
    may_be_called = [tool for tool in asked.tools if named in (None, tool.function.name)]
    is_required = asked.tool_choice not in (None, "auto")
    sent: Json = {"tools": [_sent(tool) for tool in asked.tools], "tool_choice": "none"}
    if grammar := _grammar(asked, placed, form, may_be_called, is_required=is_required):
        sent["response_format"] = {"type": "lark_grammar", "lark_grammar": grammar}
    return ToolUse(
        form=form,
        sent=sent,
        tools=tuple(_sent(tool) for tool in asked.tools),
        callable_names=frozenset(tool.function.name for tool in may_be_called),
        is_required=is_required,
        control_tokens=placed.control_tokens,
    )


def _form_of(placed: PlacedModel) -> Form:
    if not placed.abilities.takes_tools:
        raise Refused(400, "This model does not take tools: its chat template does not read them.", param="tools")
    if placed.abilities.form is None:
        raise Refused(400, "The form of this model's tool calls is not known to the server.", param="tools")
    return placed.abilities.form


def _sent(tool: Tool) -> Json:
    """Return a tool as the chat template gets it; `strict` is for the server, and the runtime refuses it."""
    return tool.model_dump(mode="json", exclude={"function": {"strict"}}, exclude_none=True)


def _grammar(
    asked: ChatRequest, placed: PlacedModel, form: Form, tools: Sequence[Tool], *, is_required: bool
) -> str | None:
    parallel = asked.parallel_tool_calls is not False
    needed = {"tool_choice": is_required, "tools": any(tool.function.strict for tool in tools)}
    needed["parallel_tool_calls"] = not parallel
    if not any(needed.values()):
        return None
    if form.frame is None:
        param = next(name for name, is_needed in needed.items() if is_needed)
        said = f"This model's form of tool calls ({form.name}) has no grammar, so {param} cannot be guaranteed."
        raise Refused(400, said, param=param)
    abilities = placed.abilities
    grammar, offered = CallGrammar(form.frame, abilities.tokens), [_sent(tool) for tool in tools]
    if is_required:
        return grammar.required(offered, parallel=parallel, marks=abilities.simple_marks, opened=abilities.opened)
    return grammar.optional(offered, parallel=parallel)
