"""Authentication: requests without the token are refused."""

import secrets

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from slmops.infra.foundry.openai_server.errors import Refused


class BearerToken:
    """Middleware: passes requests with the token (all requests if it is None) and refuses others with 401."""

    def __init__(self, app: ASGIApp, token: str | None, refusal: Refused) -> None:
        self._app = app
        self._token = token
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if self._token is None or _bears(Request(scope), self._token):
            await self._app(scope, receive, send)
        else:
            await self._refusal.response()(scope, receive, send)


def _bears(request: Request, token: str) -> bool:
    kind, _, sent = request.headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and secrets.compare_digest(sent.strip().encode(), token.encode())
