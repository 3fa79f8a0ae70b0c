"""Clients' requests: the body is read, checked and converted to the runtime's form."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from slmops.infra.foundry.abilities import Abilities
from slmops.infra.foundry.openai_server.chat_request import (
    AssistantMessage,
    ChatRequest,
    Message,
    ResponseFormat,
    SchemaFormat,
    ToolMessage,
)
from slmops.infra.foundry.openai_server.errors import Refused
from slmops.infra.foundry.openai_server.tool_use import ToolUse
from slmops.infra.foundry.request_body import bounded_body
from slmops.infra.foundry.seeds import drawn_seed
from slmops.infra.foundry.served_model import RunningModel
from slmops.infra.records import Json

BREAK = "\u200b"  # a zero-width space; inside a control token it makes the token ordinary text
JSON_TYPE = "application/json"
UNIONS = ("content", "stop", "response_format", "tool_choice")

Form = TypeVar("Form", bound=BaseModel)


async def read_request(request: Request, form: type[Form], limit_bytes: int, deadline_s: float) -> Form:
    """Return a request's body; raises `Refused` for another form, `TooLarge` and `TooSlow`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:
        raise Refused(415, f"The content type of requests is {JSON_TYPE}, found {kind[:100]!r}.")
    body = await bounded_body(request, limit_bytes, deadline_s)
    try:
        body.decode("utf-8")
        return form.model_validate_json(body)
    except UnicodeDecodeError:
        raise Refused(400, "The request is not valid UTF-8.") from None
    except ValidationError as error:
        raise _refusal_of(error, form) from None


def _refusal_of(error: ValidationError, form: type[BaseModel]) -> Refused:
    # The deepest fault: of a message's, not that the list of messages is faulty.
    fault = max(error.errors(include_url=False, include_input=False), key=lambda fault: len(fault["loc"]))
    if not fault["loc"]:
        if fault["type"] in ChatRequest.model_fields:
            return Refused(400, f"{fault['msg']}.", param=fault["type"])
        if fault["type"] == "json_invalid":
            return Refused(400, f"The request is not valid JSON: {fault['ctx']['error']}.")
        return Refused(400, "The request must be a JSON object.")
    param = _param(fault["loc"])
    if fault["type"] == "extra_forbidden":
        said = f"Unrecognized request argument supplied: {param}."
        return Refused(400, said, code="unknown_parameter", param=param)
    return Refused(400, f"{param}: {_told(fault, form)}", param=param)


def _told(fault: ErrorDetails, form: type[BaseModel]) -> str:
    if fault["type"] == "string_pattern_mismatch":
        return "The character U+0000 is not allowed."
    field = form.model_fields.get(str(fault["loc"][0])) if len(fault["loc"]) == 1 else None
    said = f"{fault['msg'].rstrip('.')}."
    if field is None or field.description is None or fault["type"] == "missing":
        return said
    return field.description if fault["type"] == "none_required" else f"{said} {field.description}"


def _param(location: tuple[int | str, ...]) -> str:
    """Return a location as OpenAI writes it (`messages[0].content`), without the kinds that pydantic adds to it."""
    kinds = {2} if location[:1] == ("messages",) else set()  # of the role
    kinds |= {index + 1 for index, name in enumerate(location) if name in UNIONS}
    names = [name for index, name in enumerate(location) if index not in kinds or isinstance(name, int)]
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name[:100]}" for name in names).removeprefix(".")


def for_runtime(
    asked: ChatRequest, running: RunningModel, use: ToolUse | None, default_format: SchemaFormat | None = None
) -> Json:
    """Return a request for the runtime: the exact model, usage always, no control tokens in texts.

    `default_format` is that of a request that names none and whose tools, if any, may not be called.

    Raises `Refused` for thoughts that cannot be switched off.

    Where the client says nothing about sampling, the answer is greedy, as the answers that the gate judged.
    """
    _check_switch(asked, running.placed.abilities)
    tokens = running.placed.control_tokens
    sent: Json = {"model": running.served.model_id, "messages": [_message(each, tokens) for each in asked.messages]}
    for name in ("temperature", "top_p", "top_k", "seed", "reasoning_effort"):
        if (value := getattr(asked, name)) is not None:
            sent[name] = value
    if not {"temperature", "top_p", "top_k"} & sent.keys():
        sent["temperature"] = 0
    sent.setdefault("seed", drawn_seed())
    if limit := asked.max_completion_tokens or asked.max_tokens:
        sent["max_tokens"] = limit
    if asked.stop:
        sent["stop"] = [asked.stop] if isinstance(asked.stop, str) else list(asked.stop)
    if asked.stream:
        sent |= {"stream": True, "stream_options": {"include_usage": True}}
    if response_format := asked.response_format or (None if use else default_format):
        sent["response_format"] = runtime_format(response_format)
    if asked.chat_template_kwargs:
        sent["chat_template_kwargs"] = asked.chat_template_kwargs.model_dump()
    if use:
        sent |= _broken_object(use.sent, tokens)
    return sent


def _check_switch(asked: ChatRequest, abilities: Abilities) -> None:
    """Raise `Refused` if a model would think although the request says that it must not."""
    wanted = asked.chat_template_kwargs and asked.chat_template_kwargs.enable_thinking
    for param, is_off in (("reasoning_effort", asked.reasoning_effort), ("chat_template_kwargs", wanted is False)):
        if is_off and abilities.marks and not abilities.has_switch:
            said = "This model's chat template has no enable_thinking: its reasoning cannot be switched off."
            raise Refused(400, said, param=param)


def runtime_format(asked: ResponseFormat) -> Json:
    """Return a response format in the runtime's form, in which the schema is not in an object with its name."""
    if not isinstance(asked, SchemaFormat):
        return {"type": asked.type}
    schema = asked.json_schema.json_schema
    return {"type": asked.type, "json_schema": {"type": "object"} if schema is None else schema}


def _message(message: Message, control_tokens: tuple[str, ...]) -> Json:
    """Break control tokens in all texts of a message, because a text must not end its turn or begin another one."""
    role = "system" if message.role == "developer" else message.role  # no chat template knows the newer name
    texts: dict[str, JsonValue] = {"content": message.text}
    if isinstance(message, ToolMessage):
        texts["tool_call_id"] = message.tool_call_id
    elif message.name is not None:
        texts["name"] = message.name
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            texts["tool_calls"] = [call.as_sent for call in message.tool_calls]
        if message.reasoning_content:
            texts["reasoning_content"] = message.reasoning_content
    return {"role": role, **_broken_object(texts, control_tokens)}


def _broken_object(texts: Json, control_tokens: tuple[str, ...]) -> Json:
    return {name: _broken_within(value, control_tokens) for name, value in texts.items()}


def _broken_within(value: JsonValue, control_tokens: tuple[str, ...]) -> JsonValue:
    if isinstance(value, str):
        return broken(value, control_tokens)
    if isinstance(value, list):
        return [_broken_within(item, control_tokens) for item in value]
    if isinstance(value, Mapping):
        return {name: _broken_within(item, control_tokens) for name, item in value.items()}
    return value


def whole(text: str, control_tokens: tuple[str, ...]) -> str:
    """Return a text in which `broken` control tokens are whole again, such as code that an answer repeats."""
    for token in control_tokens:
        text = text.replace(f"{token[:1]}{BREAK}{token[1:]}", token)
    return text


def broken(text: str, control_tokens: tuple[str, ...]) -> str:
    """Return a text with a zero-width space inside each control token."""
    for token in sorted(control_tokens, key=len, reverse=True):
        if token in text:
            text = text.replace(token, f"{token[:1]}{BREAK}{token[1:]}")
    return text
