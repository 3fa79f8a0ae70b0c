"""The server in front of the models: OpenAI's API under stable names, a token, queues, metrics, and the hand-over.

Foundry's web service accepts exact ids only, and has no authentication and no queue. Its responses are passed on
unchanged.
"""

import time
from contextlib import AsyncExitStack

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from slmops.infra import errors
from slmops.infra.foundry.browser_access import BrowserAccess
from slmops.infra.foundry.following import Following
from slmops.infra.foundry.model_host import ModelHost
from slmops.infra.foundry.openai_server.answers import Relay, ask_runtime, usage_of, while_connected
from slmops.infra.foundry.openai_server.chat_request import ChatRequest, SchemaFormat
from slmops.infra.foundry.openai_server.default_format import default_format_of
from slmops.infra.foundry.openai_server.errors import HANDLERS, Refused
from slmops.infra.foundry.openai_server.metrics import Metrics
from slmops.infra.foundry.openai_server.openapi import openapi_document
from slmops.infra.foundry.openai_server.requests import Form, for_runtime, read_request
from slmops.infra.foundry.openai_server.token import BearerToken
from slmops.infra.foundry.openai_server.tool_answers import answered_calls, streamed_calls
from slmops.infra.foundry.openai_server.tool_use import tool_use
from slmops.infra.foundry.served_model import NotServed
from slmops.infra.server_settings import ServeSettings


class NextChampion(BaseModel):
    """The request for another champion; the precision is what the caller expects of it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    version: int = Field(ge=1)
    precision: str | None = None


def openai_server(
    host: ModelHost,
    following: Following,
    settings: ServeSettings,
    control_token: str,
    default_format: SchemaFormat | None = None,
) -> Starlette:
    """Return the ASGI application: `/v1/models`, `/v1/chat/completions`, `/health`, `/ready`, `/metrics`,
    `/openapi.json`.

    `default_format` is the response format of requests that name none and call no tools, in place of the versions' own.

    `/v1` and `/metrics` require the settings' token if there is one. `/slmops/v1` requires the control token, which
    only processes of this user can read.
    """
    front = _Front(host, following, settings, default_format)
    token = settings.token.get_secret_value() if settings.token else None
    wrong_key = Refused(401, "Incorrect API key provided.", code="invalid_api_key")
    clients = [Middleware(BearerToken, token, wrong_key)]
    control = [Middleware(BearerToken, control_token, Refused(401, "Incorrect control token."))]
    return Starlette(
        routes=[
            Route("/health", front.health),
            Route("/ready", front.ready),
            Route("/openapi.json", front.openapi),
            Route("/metrics", front.metrics, middleware=clients),
            Route("/v1/models", front.list_models, middleware=clients),
            Route("/v1/models/{model:path}", front.show_model, middleware=clients),
            Route("/v1/chat/completions", front.chat, methods=["POST"], middleware=clients),
            Route("/slmops/v1/models", front.states, middleware=control),
            Route("/slmops/v1/models/{name}/champion", front.change_champion, methods=["POST"], middleware=control),
        ],
        middleware=[
            Middleware(
                BrowserAccess,
                origins=settings.allowed_origins,
                hosts=settings.allowed_hosts if settings.allowed_hosts or not token else None,
                refuse=lambda status, said, remedy: Refused(status, f"{said} {remedy}").response(),
                section="SERVE",
            ),
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                allow_private_network=True,
            ),
        ],
        exception_handlers=HANDLERS,
    )


class _Front:
    """The request handlers; `HANDLERS` turns their exceptions into responses."""

    def __init__(
        self, host: ModelHost, following: Following, settings: ServeSettings, default_format: SchemaFormat | None
    ) -> None:
        self._host = host
        self._default_format = default_format
        self._following = following
        self._settings = settings
        self._metrics = Metrics(host)
        self._openapi = openapi_document(has_token=settings.token is not None)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        if not self._host.is_ready:
            return JSONResponse({"status": "not ready", "reason": "No model is loaded."}, 503)
        if self._following.behind:
            reason = f"{', '.join(self._following.behind)}: the store's champion is not served; see the server's log."
            return JSONResponse({"status": "behind", "reason": reason}, 503)
        if failing := self._host.failing:
            return JSONResponse({"status": "ready", "not_loaded": failing})
        return JSONResponse({"status": "ready"})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(self._openapi)

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def list_models(self, _: Request) -> Response:
        ids = sorted({*self._host.champions, *(served.model_id for served in self._host.champions.values())})
        return JSONResponse({"object": "list", "data": [_model(model_id) for model_id in ids]})

    async def show_model(self, request: Request) -> Response:
        model = request.path_params["model"]
        await self._host.resolve(model)
        return JSONResponse(_model(model))

    async def states(self, _: Request) -> Response:
        models = [
            {"name": name, "version": served.version, "precision": served.precision, **self._host.state_of(served)}
            for name, served in sorted(self._host.champions.items())
        ]
        return JSONResponse({"models": models})

    async def change_champion(self, request: Request) -> Response:
        asked = await self._read(request, NextChampion)
        try:
            served, former = await self._host.hand_over(request.path_params["name"], asked.version)
        except errors.SlmopsError as error:
            fault = {"message": error.message, "what_to_do": error.what_to_do}
            return JSONResponse({"error": fault}, 404 if isinstance(error, NotServed) else 409)
        return JSONResponse({"version": served.version, "former": former.version if former else None})

    async def chat(self, request: Request) -> Response:
        began = time.perf_counter()
        asked = await self._read(request, ChatRequest)
        name = asked.model if asked.model in self._host.champions else ""
        with self._metrics.counted(name, began) as counted:
            async with AsyncExitStack() as taken:
                running = await taken.enter_async_context(self._host.turn(asked.model))
                counted.model = running.served.name
                use = tool_use(asked, running.placed)
                default = self._default_format or default_format_of(running.placed)
                sent = for_runtime(asked, running, use, default)
                answer = await while_connected(request, ask_runtime(self._host, running, sent))
                taken.push_async_callback(answer.response.aclose)
                if asked.stream:
                    keep_usage = bool(asked.stream_options and asked.stream_options.include_usage)
                    answer = streamed_calls(answer, use) if use else answer
                    return Relay(answer, taken.pop_all(), counted, keep_usage=keep_usage)
                content = await while_connected(request, answer.response.aread())
                content = answered_calls(content, use) if use else content
        counted.answered(200, usage_of(content))
        return Response(content, media_type="application/json")

    async def _read(self, request: Request, form: type[Form]) -> Form:
        return await read_request(request, form, self._settings.max_request_bytes, self._settings.receive_timeout_s)


def _model(model_id: str) -> dict[str, object]:
    return {"id": model_id, "object": "model", "created": 0, "owned_by": "slmops"}
