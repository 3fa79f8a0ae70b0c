"""Protection of local servers from web pages: the headers Host and Origin of every request are checked.

A page of any site can send requests to loopback from the browser of this machine's user. With a host name that it
controls (DNS rebinding) it could also read the answers.
"""

import ipaddress
from collections.abc import Callable, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send


class BrowserAccess:
    """Middleware: refuses requests from web pages of other origins, and requests with another host name.

    `origins` may send requests. Without `hosts` every name is accepted, which is only safe with a token; IP addresses
    and `localhost` are always accepted, because no DNS server decides where they lead. `refuse` makes the response from
    a status, a sentence and a remedy.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        origins: Iterable[str],
        hosts: Iterable[str] | None,
        refuse: Callable[[int, str, str], Response],
        section: str,
    ) -> None:
        self._app = app
        self._origins = set(origins)
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._refuse = refuse
        self._section = section

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        refusal = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, headers: Headers) -> Response | None:
        if not self._is_ours(headers.getlist("host")):
            remedy = f"Use its IP address, or add the name to SLMOPS_{self._section}__ALLOWED_HOSTS."
            return self._refuse(421, "The server does not answer to this host name.", remedy)
        if set(headers.getlist("origin")) - self._origins:
            remedy = f"Add its origin to SLMOPS_{self._section}__ALLOWED_ORIGINS."
            return self._refuse(403, "Requests of this web page's origin are not allowed.", remedy)
        return None

    def _is_ours(self, sent: list[str]) -> bool:
        if self._hosts is None:
            return True
        name = None
        if len(sent) == 1:
            with suppress(ValueError):  # brackets without an address
                name = urlsplit(f"//{sent[0]}").hostname
        return name is not None and (name in self._hosts or name == "localhost" or _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
