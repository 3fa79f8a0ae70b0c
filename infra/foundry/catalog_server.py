"""The catalog over HTTP: the service that Foundry Local's runtime queries, and the upstream catalog behind it."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from pydantic import JsonValue
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ExceptionHandler

from slmops.infra.errors import BadInput, SlmopsError
from slmops.infra.foundry.browser_access import BrowserAccess
from slmops.infra.foundry.catalog import (
    CATALOG_PATH,
    CatalogModel,
    CatalogQuery,
    find_page,
    outward_query,
    page_document,
    parse_query,
)
from slmops.infra.foundry.request_body import TooLarge, TooSlow, bounded_body
from slmops.infra.records import Json

HEALTH_PATH = "/health"
LARGEST_REQUEST_BYTES = 1 << 20
LARGEST_UPSTREAM_BYTES = 16 << 20
RECEIVE_TIMEOUT_S = 30.0
UPSTREAM_TIMEOUT_S = 3.0
UPSTREAM_REST_S = 30.0  # pause after a failure of upstream, because the runtime would wait for each of its pages

# Tokens of upstream's pages start like this; ours are NAME:VERSION, and no name has a slash.
_UPSTREAM_PREFIX = "upstream/"
# The runtime's own value. According to its published source, the public catalog refuses others.
_UPSTREAM_HEADERS = {
    "User-Agent": "AzureAiStudio",
    "x-ms-use-full-service-contracts": "true",
    "Content-Type": "application/json",
}

_logger = logging.getLogger(__name__)


def catalog_app(
    models: Callable[[], Sequence[CatalogModel]],
    upstream: str | None = None,
    token: str | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> Starlette:
    """Return the HTTP service: POST `CATALOG_PATH` is the catalog's request, GET `HEALTH_PATH` checks that it serves.

    `models` is called for every request, in a thread of its own. The entries of the catalog at the URL `upstream`
    follow on the pages after ours, without those that share a name with ours. While upstream cannot be reached, only
    ours are listed. With a `token`, catalog requests need `?token=` in their URL, because the runtime can send a token
    in no other way.

    `hosts` and `origins` are those of `BrowserAccess`.

    A failure is answered as `{"error": {"message", "what_to_do"}}`: 400 for a request of another form, 401 without the
    token, 403 for a web page of another origin, 408 for a slow request, 413 for one larger than
    `LARGEST_REQUEST_BYTES`, 421 for another host name, and 503 while `models` raises.
    """
    other = _Upstream(upstream) if upstream else None

    async def ask(request: Request) -> Response:
        given = request.query_params.get("token", "")
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            return _failed(401, "The request has no valid token.", "Add ?token=... to the catalog's URL.")
        query = parse_query(await bounded_body(request, LARGEST_REQUEST_BYTES, RECEIVE_TIMEOUT_S))
        return _json(await _answer(query, await run_in_threadpool(models), other))

    async def health(request: Request) -> Response:
        await run_in_threadpool(models)
        return _json({"status": "ok"})

    # The runtime does not follow redirects, so a URL with a slash at its end has its own route.
    routes = [Route(path, ask, methods=["POST"]) for path in (CATALOG_PATH, f"{CATALOG_PATH}/")]
    access = Middleware(
        BrowserAccess,
        origins=origins,
        hosts=hosts if hosts or not token else None,
        refuse=_failed,
        section="CATALOG",
    )
    app = Starlette(routes=[*routes, Route(HEALTH_PATH, health)], middleware=[access], exception_handlers=_HANDLERS)
    app.router.redirect_slashes = False
    return app


async def _error_answer(request: Request, error: Exception) -> Response:
    match error:
        case HTTPException():
            return _failed(error.status_code, f"{error.detail}.", f"POST to {CATALOG_PATH}.")
        case TooLarge():
            return _failed(413, str(error), "Request fewer names.")
        case TooSlow():
            return _failed(408, str(error), "Ask again.")
        case BadInput():
            return _failed(400, error.message, error.what_to_do)
        case SlmopsError():
            _logger.warning("The models cannot be listed: %s", error)
            return _failed(503, "The models cannot be listed.", "See the log of slmops catalog.")
        case _:  # starlette raises it again after this answer, and uvicorn logs it
            return _failed(
                503, f"The models cannot be listed: {type(error).__name__}.", "See the log of slmops catalog."
            )


_HANDLERS: dict[Any, ExceptionHandler] = dict.fromkeys(
    (HTTPException, TooLarge, TooSlow, SlmopsError, Exception), _error_answer
)


async def _answer(query: CatalogQuery, ours: Sequence[CatalogModel], other: "_Upstream | None") -> Json:
    token = query.continuation_token or ""
    if token.startswith(_UPSTREAM_PREFIX):
        return await _upstream_page(replace(query, continuation_token=token[len(_UPSTREAM_PREFIX) :]), ours, other)
    page, next_token, count = find_page(ours, query)
    if next_token is None and other and other.may_be_asked and outward_query(query, ours):
        next_token = _UPSTREAM_PREFIX
    return page_document([model.entry() for model in page], next_token, count)


async def _upstream_page(query: CatalogQuery, ours: Sequence[CatalogModel], other: "_Upstream | None") -> Json:
    outward = outward_query(query, ours)
    answer = await other.ask(outward) if other and outward else None
    if answer is None:
        return page_document([], None, len(ours))
    form, entries, token = answer
    names = {model.name for model in ours}
    foreign = [entry for entry in entries if _name_of(entry) not in names]
    return page_document(foreign, f"{_UPSTREAM_PREFIX}{token}" if token else None, len(ours) + len(foreign), form)


def _name_of(entry: object) -> object:
    properties = entry.get("properties") if isinstance(entry, dict) else None
    named = properties if isinstance(properties, dict) else entry
    return named.get("name") if isinstance(named, dict) else None


def _json(document: Mapping[str, object], status: int = 200) -> Response:
    return Response(json.dumps(document), status, media_type="application/json")


def _failed(status: int, message: str, what_to_do: str) -> Response:
    return _json({"error": {"message": message, "what_to_do": what_to_do}}, status)


class _Upstream:
    """The upstream catalog. Requests have a short timeout, and after a failure it is not asked for some time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._rests_until = 0.0
        self._has_failed = False

    @property
    def may_be_asked(self) -> bool:
        return time.monotonic() >= self._rests_until

    async def ask(self, query: CatalogQuery) -> tuple[str, list[JsonValue], str | None] | None:
        """Return (the key of the entries, the entries, the next page's token), or None while it is unreachable."""
        import httpx

        if not self.may_be_asked:
            return None
        try:
            async with asyncio.timeout(UPSTREAM_TIMEOUT_S), httpx.AsyncClient(timeout=UPSTREAM_TIMEOUT_S) as client:
                content = json.dumps(query.to_json()).encode()
                async with client.stream("POST", self._url, content=content, headers=_UPSTREAM_HEADERS) as response:
                    response.raise_for_status()
                    body = bytearray()
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        if len(body) > LARGEST_UPSTREAM_BYTES:
                            raise ValueError(f"its answer is larger than {LARGEST_UPSTREAM_BYTES:,} bytes")
            answer = _read_answer(bytes(body))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
            self._rests_until = time.monotonic() + UPSTREAM_REST_S
            if not self._has_failed:  # once per outage, because the runtime asks often
                reason = str(error) or type(error).__name__
                _logger.warning("The catalog %s cannot be asked, and only our models are listed: %s", self._url, reason)
            self._has_failed = True
            return None
        self._has_failed = False
        return answer


def _read_answer(body: bytes) -> tuple[str, list[JsonValue], str | None]:
    document = json.loads(body, parse_constant=_refuse_constant)
    for form in ("value", "summaries"):  # the runtime accepts either
        entries = document.get(form) if isinstance(document, dict) else None
        if isinstance(entries, list):
            token = document.get("continuationToken")
            return form, entries, token if isinstance(token, str) and token else None
    raise ValueError("its answer has no list of models")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"its answer is not JSON: {text}")
