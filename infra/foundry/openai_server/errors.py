"""Error responses in OpenAI's form, and the application's exception handlers."""

import json
import re
from typing import Any

import httpx
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ExceptionHandler

from slmops.infra.errors import SlmopsError
from slmops.infra.foundry.request_body import TooLarge
from slmops.infra.foundry.served_model import Busy, NotServed

RETRY_AFTER_S = 1
CLIENT_GONE = 499  # nginx's status; only the metrics use it
# "requires 2064 total tokens (16 input + 2048 output), which exceeds the model's maximum context length of 1024"
OVER_CONTEXT = re.compile(r"\((\d+) input \+ \d+ output\).*context length of (\d+)")
_NATIVE_PREFIX = re.compile(r"\w+\.cc:\d+ .*?\)(?: const)? (?=\S)")


class Refused(Exception):
    """The refusal of a request: the HTTP status, and OpenAI's record of the error."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def response(self) -> Response:
        """Return the HTTP response."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else None
        return JSONResponse({"error": self.error}, self.status, headers)


def refusal_of(error: Exception) -> Refused:
    """Return the client's form of an error, without internal details."""
    text = f"{error.message} {error.what_to_do}" if isinstance(error, SlmopsError) else ""
    refusals: dict[type[Exception], tuple[int, str, str, str | None, str | None]] = {
        ClientDisconnect: (CLIENT_GONE, "The client disconnected.", "invalid_request_error", None, None),
        TooLarge: (413, str(error), "invalid_request_error", None, None),
        NotServed: (404, text, "invalid_request_error", "model_not_found", "model"),
        Busy: (429, text, "rate_limit_error", "rate_limit_exceeded", None),
        SlmopsError: (503, text, "server_error", "model_not_available", None),
        httpx.TimeoutException: (504, "The model did not answer in time.", "server_error", "timeout", None),
        httpx.HTTPError: (
            502,
            "The model's process ended before the answer was complete.",
            "server_error",
            "model_crashed",
            None,
        ),
        Exception: (500, "The server failed; see its log.", "server_error", None, None),
    }
    if isinstance(error, Refused):
        return error
    return Refused(*next(refusals[kind] for kind in type(error).__mro__ if kind in refusals))


def runtime_refusal(status: int, content: bytes) -> Refused:
    """Return the runtime's own refusal, without the places in its source code."""
    try:
        error = json.loads(content)["error"]
        message, kind, code, param = (error.get(name) for name in ("message", "type", "code", "param"))
    except (ValueError, KeyError, TypeError, AttributeError):
        message, kind, code, param = "The model refused the request.", None, None, None
    if status < 400:
        status = 502
    message = _NATIVE_PREFIX.sub("", str(message))
    if OVER_CONTEXT.search(message):
        code, param = "context_length_exceeded", "messages"
    return Refused(status, message, str(kind or "server_error"), code, param)


async def _error_response(request: Request, error: Exception) -> Response:
    return refusal_of(error).response()


async def _route_error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"Unknown request: {request.method} {request.url.path}"
    return Refused(error.status_code, message, code="unknown_url").response()


HANDLERS: dict[Any, ExceptionHandler] = {
    HTTPException: _route_error_response,
    **dict.fromkeys((Refused, ClientDisconnect, TooLarge, SlmopsError, httpx.HTTPError, Exception), _error_response),
}
