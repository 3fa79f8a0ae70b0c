"""Clients' requests: the body is checked and converted to the runtime's form."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from slmops.infra.foundry.openai_server.errors import OVER_CONTEXT, Refused
from slmops.infra.foundry.request_body import bounded_body
from slmops.infra.foundry.served_model import RunningModel

BREAK = "\u200b"  # a zero-width space; inside a control token it makes the token ordinary text


async def read_body(request: Request, limit_bytes: int) -> dict[str, Any]:
    """Return a request's JSON object; raises `Refused` if it is not one, and `TooLarge`."""
    received = await bounded_body(request, limit_bytes)
    try:
        body = json.loads(received.decode("utf-8"))
    except UnicodeDecodeError:
        raise Refused(400, "The request is not valid UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The request is not valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise Refused(400, "The request must be a JSON object.")
    return body


def checked_chat(body: Mapping[str, object]) -> tuple[str, bool]:
    """Return the model's name and whether the client wants usage in a stream; raises `Refused`."""
    model, messages = body.get("model"), body.get("messages")
    if not isinstance(model, str) or not model:
        raise Refused(400, "you must provide a model parameter", param="model")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise Refused(400, "messages must be a list of at least one message.", param="messages")
    if body.get("n") not in (None, 1):
        raise Refused(400, "One answer is made per request: n must be 1.", param="n")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object.", param="stream_options")
    return model, bool((options or {}).get("include_usage"))


def for_runtime(body: Mapping[str, Any], running: RunningModel) -> dict[str, object]:
    """Return a checked request for the runtime: the exact model, usage always, no control tokens in texts."""
    control_tokens = running.placed.control_tokens
    sent = {**body, "model": running.served.model_id}
    sent["messages"] = [_without_control_tokens(message, control_tokens) for message in body["messages"]]
    if body.get("stream"):
        sent["stream_options"] = {"include_usage": True}
    if "max_completion_tokens" in sent:
        sent.setdefault("max_tokens", sent.pop("max_completion_tokens"))
    return sent


def room_for_answer(refused: Refused, body: Mapping[str, object]) -> int | None:
    """Return the tokens left for the answer, if the prompt fits and only the runtime's default of 2,048 does not."""
    if any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens")):
        return None
    found = OVER_CONTEXT.search(refused.error["message"] or "")
    room = int(found[2]) - int(found[1]) if found else 0
    return room if room > 0 else None


def _without_control_tokens(message: Mapping[str, object], control_tokens: tuple[str, ...]) -> dict[str, object]:
    """Break control tokens in texts, because a text must not end its turn or begin another one."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": broken(content, control_tokens)}
    if isinstance(content, list):
        parts = [
            {**part, "text": broken(part["text"], control_tokens)}
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
        return {**message, "content": parts}
    return dict(message)


def broken(text: str, control_tokens: tuple[str, ...]) -> str:
    """Return a text with a zero-width space inside each control token."""
    for token in sorted(control_tokens, key=len, reverse=True):
        if token in text:
            text = text.replace(token, f"{token[:1]}{BREAK}{token[1:]}")
    return text
