"""The server in front of the models: OpenAI's API under stable names, a token, queues, metrics, and the hand-over.

Foundry's web service answers to exact ids only, checks nobody and has no queue. What it sends is passed on as it comes.
"""

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from slmops.infra import errors
from slmops.infra.foundry.model_host import Busy, ModelHost, NotServed, RunningModel
from slmops.infra.settings import ServeSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

BREAK = "\u200b"  # a zero-width space: a text with it inside is no control token any more
ATTEMPTS = 2
RETRY_AFTER_S = 1
CLIENT_GONE = 499  # nginx's; nobody reads it but the metrics
DISCONNECT_POLL_S = 0.5
CRASH_NOTICED_S = 0.2  # a connection breaks off a little before its process is seen to have ended
# "requires 2064 total tokens (16 input + 2048 output), which exceeds the model's maximum context length of 1024"
_OVER_CONTEXT = re.compile(r"\((\d+) input \+ \d+ output\).*context length of (\d+)")
_NATIVE_PREFIX = re.compile(r"\w+\.cc:\d+ .*?\)(?: const)? (?=\S)")
_SENT_AGAIN = (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


def openai_server(
    host: ModelHost,
    settings: ServeSettings,
    control_token: str,
    lifespan: Callable[["Starlette"], AbstractAsyncContextManager[None]] | None = None,
) -> "Starlette":
    """Return the ASGI application: `/v1/models`, `/v1/chat/completions`, `/health`, `/ready`, `/metrics`.

    `/v1` and `/metrics` ask for the settings' token where there is one, `/slmops/v1` for the control token.
    """
    from starlette.applications import Starlette
    from starlette.routing import Route

    front = _Front(host, settings, control_token)
    return Starlette(
        routes=[
            Route("/health", front.health),
            Route("/ready", front.ready),
            Route("/metrics", front.guarded(front.metrics)),
            Route("/v1/models", front.guarded(front.list_models)),
            Route("/v1/models/{model:path}", front.guarded(front.show_model)),
            Route("/v1/chat/completions", front.guarded(front.chat), methods=["POST"]),
            Route("/slmops/v1/models", front.controlled(front.states)),
            Route("/slmops/v1/models/{name}/champion", front.controlled(front.change_champion), methods=["POST"]),
        ],
        exception_handlers={404: _no_route, 405: _no_route, 500: _internal},
        lifespan=lifespan,
    )


class _Refused(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, kind: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def response(self) -> "Response":
        from starlette.responses import JSONResponse

        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else None
        return JSONResponse({"error": self.error}, self.status, headers)


T = TypeVar("T")
Handler = Callable[["Request"], Any]


class _Front:
    def __init__(self, host: ModelHost, settings: ServeSettings, control_token: str) -> None:
        self._host = host
        self._settings = settings
        self._token = settings.token.get_secret_value() if settings.token else None
        self._control_token = control_token
        self._metrics = _Metrics(host)

    # Who may ask

    def guarded(self, handler: Handler) -> Handler:
        """Ask for the clients' token, where there is one."""

        async def checked(request: "Request") -> "Response":
            if self._token and not _bears(request, self._token):
                return _Refused(
                    401, "Incorrect API key provided.", "invalid_request_error", "invalid_api_key"
                ).response()
            return await self._answered(handler, request)

        return checked

    def controlled(self, handler: Handler) -> Handler:
        """Ask for the control token, which only this user's own processes can read."""

        async def checked(request: "Request") -> "Response":
            if not _bears(request, self._control_token):
                return _Refused(401, "Incorrect control token.", "invalid_request_error").response()
            return await self._answered(handler, request)

        return checked

    async def _answered(self, handler: Handler, request: "Request") -> "Response":
        try:
            response: Response = await handler(request)
        except _Refused as refused:
            return refused.response()
        return response

    # Health

    async def health(self, _: "Request") -> "Response":
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok"})

    async def ready(self, _: "Request") -> "Response":
        from starlette.responses import JSONResponse

        ready = self._host.is_ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics(self, _: "Request") -> "Response":
        from prometheus_client import CONTENT_TYPE_LATEST
        from starlette.responses import Response

        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    # Models

    async def list_models(self, _: "Request") -> "Response":
        from starlette.responses import JSONResponse

        ids = sorted({*self._host.champions, *(one.model_id for one in self._host.champions.values())})
        return JSONResponse({"object": "list", "data": [_model(one) for one in ids]})

    async def show_model(self, request: "Request") -> "Response":
        from starlette.responses import JSONResponse

        model = request.path_params["model"]
        try:
            await self._host.resolve(model)
        except NotServed as error:
            raise _not_found(error) from None
        return JSONResponse(_model(model))

    async def states(self, _: "Request") -> "Response":
        from starlette.responses import JSONResponse

        loaded = {one.served for one in self._host.models if one.is_loaded}
        models = [
            {
                "name": name,
                "version": served.version,
                "precision": served.precision,
                "state": "loaded" if served in loaded else "not loaded",
            }
            for name, served in sorted(self._host.champions.items())
        ]
        return JSONResponse({"models": models})

    async def change_champion(self, request: "Request") -> "Response":
        from starlette.responses import JSONResponse

        version = (await self._body(request)).get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise _bad_request("version must be a positive integer.", "version")
        try:
            served, former = await self._host.hand_over(request.path_params["name"], version)
        except errors.SlmopsError as error:
            told = {"message": error.message, "what_to_do": error.what_to_do}
            return JSONResponse({"error": told}, 404 if isinstance(error, NotServed) else 409)
        return JSONResponse({"version": served.version, "former": former.version if former else None})

    # Answers

    async def chat(self, request: "Request") -> "Response":
        began = time.perf_counter()
        body = await self._body(request)
        model, wants_usage = _checked(body)
        with self._metrics.counted(model if model in self._host.champions else "") as counted:
            turn = self._host.turn(model)
            try:
                running = await turn.__aenter__()
            except errors.SlmopsError as error:
                raise _refusal(error) from None
            try:
                counted.model = running.served.name
                upstream = await _while_connected(request, self._asked(running, body))
            except BaseException:
                await turn.__aexit__(None, None, None)
                raise
            if not body.get("stream"):
                try:
                    content = await _while_connected(request, _read(upstream))
                finally:
                    await upstream.aclose()
                    await turn.__aexit__(None, None, None)
                counted.answered(began, _usage(content))
                return _passed_on(content)
        return self._relay(upstream, turn, began, running.served.name, keep_usage=wants_usage)

    async def _body(self, request: "Request") -> dict[str, Any]:
        limit = self._settings.max_request_bytes
        received = bytearray()
        async for chunk in request.stream():
            received += chunk
            if len(received) > limit:
                raise _Refused(413, f"The request has more than {limit:,} bytes.", "invalid_request_error")
        try:
            body = json.loads(received.decode("utf-8"))
        except UnicodeDecodeError:
            raise _bad_request("The request is not valid UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise _bad_request(f"The request is not valid JSON: {error}.") from None
        if not isinstance(body, dict):
            raise _bad_request("The request must be a JSON object.")
        return body

    async def _asked(self, running: RunningModel, body: Mapping[str, Any]) -> httpx.Response:
        """Send the request to the model's process, once more where that died before it answered."""
        sent = _for_runtime(body, running)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._host.ensure_loaded(running)
                upstream = await self._send(running, sent)
                if upstream.status_code == 200:
                    return upstream
                refused = _runtime_refusal(upstream.status_code, await upstream.aread())
                room = _room(refused, body)
                if room is None:
                    raise refused
                sent["max_tokens"] = room
                upstream = await self._send(running, sent)
                if upstream.status_code == 200:
                    return upstream
                raise _runtime_refusal(upstream.status_code, await upstream.aread())
            except _SENT_AGAIN as error:
                if attempt == ATTEMPTS:
                    raise _broken_off(error) from None
                await asyncio.sleep(CRASH_NOTICED_S)
            except httpx.HTTPError as error:
                raise _broken_off(error) from None
            except errors.SlmopsError as error:
                raise _refusal(error) from None
        raise AssertionError("unreachable")

    async def _send(self, running: RunningModel, body: Mapping[str, Any]) -> httpx.Response:
        request = running.client.build_request("POST", f"{running.url}/v1/chat/completions", json=body)
        return await running.client.send(request, stream=True)

    def _relay(
        self,
        upstream: httpx.Response,
        turn: AbstractAsyncContextManager[RunningModel],
        began: float,
        model: str,
        *,
        keep_usage: bool,
    ) -> "Response":
        from starlette.responses import StreamingResponse

        metrics = self._metrics

        async def events() -> AsyncIterator[bytes]:
            usage: Mapping[str, Any] = {}
            is_first = True
            try:
                async for event in _events(upstream):
                    found = _usage_of_event(event)
                    if found:
                        usage = found
                        if not keep_usage:
                            continue
                    elif is_first and _has_text(event):
                        is_first = False
                        metrics.first_token(model, time.perf_counter() - began)
                    yield event
                metrics.answered(model, 200, time.perf_counter() - began, usage)
            except httpx.HTTPError as error:
                metrics.answered(model, 502, time.perf_counter() - began, usage)
                yield b"data: " + json.dumps({"error": _broken_off(error).error}).encode() + b"\n\n"

        class Relay(StreamingResponse):
            async def __call__(self, *arguments: Any) -> None:
                # Whatever becomes of the client, also before the first event: the turn ends, and the runtime stops.
                try:
                    await super().__call__(*arguments)
                finally:
                    await upstream.aclose()
                    await turn.__aexit__(None, None, None)

        return Relay(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


# Requests


def _bears(request: "Request", token: str) -> bool:
    kind, _, sent = request.headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and secrets.compare_digest(sent.strip().encode(), token.encode())


def _checked(body: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the model's name and whether the client wants usage in a stream; raises `_Refused`."""
    model, messages = body.get("model"), body.get("messages")
    if not isinstance(model, str) or not model:
        raise _bad_request("you must provide a model parameter", "model")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise _bad_request("messages must be a list of at least one message.", "messages")
    if body.get("n") not in (None, 1):
        raise _bad_request("One answer is made per request: n must be 1.", "n")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _bad_request("stream_options must be an object.", "stream_options")
    return model, bool((options or {}).get("include_usage"))


def _for_runtime(body: Mapping[str, Any], running: RunningModel) -> dict[str, Any]:
    control_tokens = running.placed.control_tokens
    sent = {**body, "model": running.served.model_id}
    sent["messages"] = [_without_control_tokens(message, control_tokens) for message in body["messages"]]
    if body.get("stream"):
        sent["stream_options"] = {"include_usage": True}
    if "max_completion_tokens" in sent:
        sent.setdefault("max_tokens", sent.pop("max_completion_tokens"))
    return sent


def _without_control_tokens(message: Mapping[str, Any], control_tokens: tuple[str, ...]) -> dict[str, Any]:
    """Break what the tokenizer would take for a control token: a text must not end its turn or open another's."""
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
    """Return a text with a zero-width space inside each control token; a text without any stays as it is."""
    for token in sorted(control_tokens, key=len, reverse=True):
        if token in text:
            text = text.replace(token, f"{token[:1]}{BREAK}{token[1:]}")
    return text


# Answers


async def _while_connected(request: "Request", work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` does; it is cancelled, and with it the runtime's answer, when the client hangs up."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=DISCONNECT_POLL_S))[0]:
            if await request.is_disconnected():
                raise _Refused(CLIENT_GONE, "The client hung up.", "invalid_request_error")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


async def _read(upstream: httpx.Response) -> bytes:
    try:
        return await upstream.aread()
    except httpx.HTTPError as error:
        raise _broken_off(error) from None


async def _events(upstream: httpx.Response) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in upstream.aiter_raw():
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield event + b"\n\n"
    if rest.strip():
        yield rest


def _usage_of_event(event: bytes) -> Mapping[str, Any]:
    if b'"usage"' not in event or not event.startswith(b"data: {"):
        return {}
    with contextlib.suppress(ValueError):
        document = json.loads(event[len(b"data: ") :])
        if not document.get("choices") and isinstance(document.get("usage"), dict):
            usage: Mapping[str, Any] = document["usage"]
            return usage
    return {}


def _has_text(event: bytes) -> bool:
    return b'"content":"' in event and b'"content":""' not in event


def _usage(content: bytes) -> Mapping[str, Any]:
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(content).get("usage") or {}
    return {}


def _passed_on(content: bytes) -> "Response":
    from starlette.responses import Response

    return Response(content, media_type="application/json")


def _model(model_id: str) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": 0, "owned_by": "slmops"}


# Refusals


def _bad_request(message: str, param: str | None = None) -> _Refused:
    return _Refused(400, message, "invalid_request_error", None, param)


def _not_found(error: errors.SlmopsError) -> _Refused:
    return _Refused(404, f"{error.message} {error.what_to_do}", "invalid_request_error", "model_not_found", "model")


def _refusal(error: errors.SlmopsError) -> _Refused:
    if isinstance(error, NotServed):
        return _not_found(error)
    if isinstance(error, Busy):
        return _Refused(429, f"{error.message} {error.what_to_do}", "rate_limit_error", "rate_limit_exceeded")
    return _Refused(503, f"{error.message} {error.what_to_do}", "server_error", "model_not_available")


def _broken_off(error: Exception) -> _Refused:
    if isinstance(error, httpx.TimeoutException):
        return _Refused(504, "The model did not answer in time.", "server_error", "timeout")
    return _Refused(502, "The model's process ended before the answer did.", "server_error", "model_crashed")


def _runtime_refusal(status: int, content: bytes) -> _Refused:
    """Return the runtime's own refusal, without the places in its source code."""
    try:
        error = json.loads(content)["error"]
        message, kind, code, param = (error.get(name) for name in ("message", "type", "code", "param"))
    except (ValueError, KeyError, TypeError, AttributeError):
        message, kind, code, param = "The model refused the request.", None, None, None
    if status < 400:
        status = 502
    message = _NATIVE_PREFIX.sub("", str(message))
    if _OVER_CONTEXT.search(message):
        code, param = "context_length_exceeded", "messages"
    return _Refused(status, message, str(kind or "server_error"), code, param)


def _room(refused: _Refused, body: Mapping[str, Any]) -> int | None:
    """Return how many tokens are left for the answer, if only the runtime's own default of 2,048 did not fit."""
    if any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens")):
        return None
    found = _OVER_CONTEXT.search(refused.error["message"] or "")
    room = int(found[2]) - int(found[1]) if found else 0
    return room if room > 0 else None


async def _no_route(request: "Request", error: Any) -> "Response":
    message = f"Unknown request: {request.method} {request.url.path}"
    return _Refused(error.status_code, message, "invalid_request_error", "unknown_url").response()


async def _internal(request: "Request", error: Exception) -> "Response":
    return _Refused(500, "The server failed; see its log.", "server_error").response()


# Metrics


class _Metrics:
    def __init__(self, host: ModelHost) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._host = host
        self._registry = CollectorRegistry()
        shared: Any = {"registry": self._registry}
        latency = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self._requests = Counter("slmops_requests", "Requests by model and HTTP status.", ["model", "code"], **shared)
        self._latency = Histogram(
            "slmops_e2e_latency_seconds",
            "From a request to the end of its answer.",
            ["model"],
            buckets=latency,
            **shared,
        )
        self._ttft = Histogram(
            "slmops_ttft_seconds", "From a request to a stream's first text.", ["model"], buckets=latency, **shared
        )
        self._tokens = Counter("slmops_tokens", "Tokens by model and kind.", ["model", "kind"], **shared)
        labels = ["model"]
        self._rss = Gauge("slmops_model_rss_bytes", "Resident memory of a model's process.", labels, **shared)
        self._active = Gauge("slmops_requests_active", "Requests that a model is answering.", labels, **shared)
        self._waiting = Gauge("slmops_requests_waiting", "Requests that wait for a model.", labels, **shared)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        for gauge in (self._rss, self._active, self._waiting):
            gauge.clear()
        for running in self._host.models:
            model_id = running.served.model_id
            self._rss.labels(model_id).set(running.process.rss_bytes if running.process else 0)
            self._active.labels(model_id).set(running.active)
            self._waiting.labels(model_id).set(running.waiting)
        return generate_latest(self._registry)

    def first_token(self, model: str, seconds: float) -> None:
        self._ttft.labels(model).observe(seconds)

    def answered(self, model: str, status: int, seconds: float, usage: Mapping[str, Any]) -> None:
        self._requests.labels(model, str(status)).inc()
        self._latency.labels(model).observe(seconds)
        for kind in ("prompt", "completion"):
            self._tokens.labels(model, kind).inc(int(usage.get(f"{kind}_tokens") or 0))

    @contextlib.contextmanager
    def counted(self, model: str) -> Any:
        counted = _Counted(self, model)
        try:
            yield counted
        except _Refused as refused:
            self._requests.labels(counted.model, str(refused.status)).inc()
            raise


class _Counted:
    def __init__(self, metrics: _Metrics, model: str) -> None:
        self.model = model
        self._metrics = metrics

    def answered(self, began: float, usage: Mapping[str, Any]) -> None:
        self._metrics.answered(self.model, 200, time.perf_counter() - began, usage)


@asynccontextmanager
async def served(host: ModelHost, settings: ServeSettings) -> AsyncIterator[None]:
    """Keep a started host following the store's champions, and end it with its last request."""
    following = asyncio.create_task(host.follow(settings.follow_s)) if settings.follow_s else None
    try:
        yield
    finally:
        if following:
            following.cancel()
        await host.close()
