"""Error responses in OpenAI's form, and the application's exception handlers.

A response names no file, no place in the source code and no line of a log; the server's log has those.
"""

import json
import logging
import re
from typing import Any

import httpx
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ExceptionHandler

from slmops.infra.errors import SlmopsError
from slmops.infra.foundry.request_body import TooLarge, TooSlow
from slmops.infra.foundry.served_model import Busy, NotLoaded, NotServed

LOG = logging.getLogger("slmops.serve")
RETRY_AFTER_S = 1
CLIENT_GONE = 499  # nginx's status; only the metrics use it
LONGEST_REASON = 300
SHOWN_OF_NATIVE = 2000
# "requires 2064 total tokens (16 input + 2048 output), which exceeds the model's maximum context length of 1024"
OVER_CONTEXT = re.compile(r"\((\d+) input \+ (\d+) output\).*context length of (\d+)")
# The runtime's other refusals of a request, with a reason that is about the request only.
_BAD_SCHEMA = re.compile(r"Error creating grammar: ([^\n]*)")
_BAD_CONVERSATION = re.compile(r"(?:Inference failed: )?([^\n]*) at row \d+, column \d+:", re.ASCII)
_UNKNOWN_CALL = re.compile(r"tool result references unknown tool call id|tool call id .*more than once")


class Refused(Exception):
    """The refusal of a request: the HTTP status, OpenAI's record of the error, and when to ask again in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float = RETRY_AFTER_S,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.retry_after_s = retry_after_s

    def response(self) -> Response:
        """Return the HTTP response."""
        headers = {"Retry-After": str(max(1, round(self.retry_after_s)))} if self.status in (429, 503) else None
        return JSONResponse({"error": self.error}, self.status, headers)


class OverContext(Refused):
    """The prompt and the answer's limit exceed the context; `room` tokens would be left for an answer."""

    def __init__(self, prompt_tokens: int, limit: int, context_tokens: int) -> None:
        super().__init__(
            400,
            f"This model's maximum context length is {context_tokens} tokens. The messages have {prompt_tokens} tokens,"
            f" and the answer's limit is {limit}.",
            code="context_length_exceeded",
            param="messages",
        )
        self.room = context_tokens - prompt_tokens


def refusal_of(error: Exception) -> Refused:
    """Return the client's form of an error, without internal details."""
    if isinstance(error, Refused):
        return error
    invalid, server = "invalid_request_error", "server_error"
    own = f"{error.message} {error.what_to_do}" if isinstance(error, SlmopsError) else str(error)
    retry_after_s = error.retry_after_s if isinstance(error, NotLoaded) else RETRY_AFTER_S
    refusals: dict[type[Exception], tuple[int, str, str, str | None, str | None]] = {
        ClientDisconnect: (CLIENT_GONE, "The client disconnected.", invalid, None, None),
        TooLarge: (413, own, invalid, None, None),
        TooSlow: (408, own, invalid, None, None),
        NotServed: (404, own, invalid, "model_not_found", "model"),
        Busy: (429, own, "rate_limit_error", "rate_limit_exceeded", None),
        NotLoaded: (503, own, server, "model_not_available", None),
        SlmopsError: (503, "The model is not available; see the server's log.", server, "model_not_available", None),
        httpx.TimeoutException: (504, "The model did not answer in time.", server, "timeout", None),
        httpx.HTTPError: (502, "The model's process ended before its answer did.", server, "model_crashed", None),
        Exception: (500, "The server failed; see its log.", server, None, None),
    }
    return Refused(*next(refusals[kind] for kind in type(error).__mro__ if kind in refusals), retry_after_s)


def runtime_refusal(content: bytes, schema_of: str = "response_format") -> Refused:
    """Return the refusal for an error that the runtime reported; its own words are for the log only.

    `schema_of` is the parameter whose schemas the answer must follow.
    """
    try:
        error = json.loads(content)["error"]
        said, is_about_request = str(error["message"]), error.get("type") == "invalid_request_error"
    except (ValueError, KeyError, TypeError, AttributeError):
        said, is_about_request = repr(content[:SHOWN_OF_NATIVE]), False
    if found := OVER_CONTEXT.search(said):
        return OverContext(*map(int, found.groups()))
    if found := _BAD_SCHEMA.search(said):
        reason = f"The schema is not supported: {_shown(found[1])}"
        return Refused(400, reason, param=schema_of)
    if found := _BAD_CONVERSATION.match(said):
        reason = f"The model's chat template refuses the conversation: {_shown(found[1])}"
        return Refused(400, reason, param="messages")
    if _UNKNOWN_CALL.search(said):
        return Refused(400, "A tool's result has a tool_call_id that no earlier message has.", param="messages")
    LOG.warning("the runtime refused a request: %r", said[:SHOWN_OF_NATIVE])
    if is_about_request:
        return Refused(400, "The model's runtime refuses the request; the server's log has the reason.")
    return Refused(502, "The model failed to answer; see the server's log.", "server_error", "model_failed")


def _shown(reason: str) -> str:
    return f"{reason[:LONGEST_REASON].strip().rstrip('.')}."


async def _error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, SlmopsError) and not isinstance(error, NotServed | Busy | NotLoaded):
        LOG.warning("a request failed: %s", error)
    return refusal_of(error).response()


async def _route_error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"Unknown request: {request.method} {request.url.path[:200]}"
    response = Refused(error.status_code, message, code="unknown_url").response()
    response.headers.update(error.headers or {})
    return response


HANDLERS: dict[Any, ExceptionHandler] = {
    HTTPException: _route_error_response,
    **dict.fromkeys(
        (Refused, ClientDisconnect, TooLarge, TooSlow, SlmopsError, httpx.HTTPError, Exception), _error_response
    ),
}
