"""Answers. A request is sent to the model's process, and the response is passed on as it arrives."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from slmops.infra.foundry.model_host import ModelHost
from slmops.infra.foundry.openai_server.errors import OverContext, Refused, refusal_of, runtime_refusal
from slmops.infra.foundry.openai_server.metrics import CountedRequest
from slmops.infra.foundry.served_model import RunningModel
from slmops.infra.records import Json

DISCONNECT_POLL_S = 0.5
CRASH_NOTICED_S = 0.2  # a connection breaks shortly before the end of its process is detected
DATA = b"data: "
_ERROR_EVENT = DATA + b'{"error"'
_SENT_AGAIN = (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """The runtime's answer, which is not read yet; `first` is a stream's first event, `events` are the others."""

    response: httpx.Response
    first: bytes = b""
    events: AsyncIterator[bytes] | None = None


async def ask_runtime(host: ModelHost, running: RunningModel, sent: Json) -> Answer:
    """Send a request to the model's process; repeat it if the process died before it answered.

    A stream is refused before its first event, as other requests are. A request without a limit of the answer gets
    what the context leaves, if the runtime's own limit is larger.

    Raises `Refused` for a refusal of the runtime, the host's errors if the model cannot be loaded, and
    `httpx.HTTPError`.
    """
    try:
        return await _post(host, running, sent)
    except _SENT_AGAIN:
        await asyncio.sleep(CRASH_NOTICED_S)
        return await _post(host, running, sent)


async def _post(host: ModelHost, running: RunningModel, sent: Json) -> Answer:
    await host.ensure_loaded(running)
    try:
        answer = await _send(running, sent)
    except OverContext as refused:
        if "max_tokens" in sent or refused.room < 1:
            raise
        answer = await _send(running, {**sent, "max_tokens": refused.room})
    running.answered()
    return answer


async def _send(running: RunningModel, sent: Json) -> Answer:
    schema_of = "tools" if "tools" in sent else "response_format"
    request = running.client.build_request("POST", f"{running.url}/v1/chat/completions", json=sent)
    response = await running.client.send(request, stream=True)
    async with AsyncExitStack() as taken:
        taken.push_async_callback(response.aclose)
        if response.status_code != 200:
            raise runtime_refusal(await response.aread(), schema_of=schema_of)
        answer = Answer(response)
        if sent.get("stream"):
            events = _events(response)
            answer = Answer(response, await anext(events, b""), events)
            if answer.first.startswith(_ERROR_EVENT):
                raise runtime_refusal(answer.first.removeprefix(DATA), schema_of=schema_of)
        taken.pop_all()
        return answer


async def while_connected(request: Request, work: Coroutine[object, object, T]) -> T:
    """Return the result of `work`. If the client disconnects, `work` and the runtime's answer are cancelled."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=DISCONNECT_POLL_S))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


class Relay(StreamingResponse):
    """Passes on a stream of events; its resources (the model's turn, the connection) are released at its end.

    The runtime always reports the usage; it is left out if the client did not ask for it.
    """

    def __init__(self, answer: Answer, taken: AsyncExitStack, counted: CountedRequest, *, keep_usage: bool) -> None:
        events = _passed_on(answer, counted, keep_usage=keep_usage)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._taken = taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        # If the client disconnects, even before the first event, the turn ends and the runtime stops.
        async with self._taken:
            await super().__call__(scope, receive, send)


async def _passed_on(answer: Answer, counted: CountedRequest, *, keep_usage: bool) -> AsyncIterator[bytes]:
    usage: Mapping[str, object] = {}
    is_first = True
    try:
        async for event in all_events(answer):
            found = _usage_of_event(event)
            if found:
                usage = found
                if not keep_usage:
                    continue
            elif event.startswith(_ERROR_EVENT):
                raise runtime_refusal(event.removeprefix(DATA))
            elif is_first and _has_text(event):
                is_first = False
                counted.first_token()
            yield event
        counted.answered(200, usage)
    except (httpx.HTTPError, Refused) as error:
        refused = refusal_of(error)
        counted.answered(refused.status, usage)
        yield DATA + json.dumps({"error": refused.error}).encode() + b"\n\n"


async def all_events(answer: Answer) -> AsyncIterator[bytes]:
    """Yield a stream's events."""
    if answer.first:
        yield answer.first
    if answer.events:
        async for event in answer.events:
            yield event


async def _events(upstream: httpx.Response) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in upstream.aiter_raw():
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield event + b"\n\n"
    if rest.strip():
        yield rest


def _usage_of_event(event: bytes) -> Mapping[str, object]:
    if b'"usage"' not in event or not event.startswith(DATA + b"{"):
        return {}
    with contextlib.suppress(ValueError):
        document = json.loads(event.removeprefix(DATA))
        if not document.get("choices") and isinstance(document.get("usage"), dict):
            usage: Mapping[str, object] = document["usage"]
            return usage
    return {}


def _has_text(event: bytes) -> bool:
    return b'"content":"' in event and b'"content":""' not in event


def usage_of(content: bytes) -> Mapping[str, object]:
    """Return the numbers of tokens that an answer reports."""
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(content).get("usage") or {}
    return {}
