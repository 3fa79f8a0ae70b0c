"""How a command serves: on loopback, or on another address with a token, until it is stopped."""

import contextlib
import ipaddress
import logging
import math
import os
import signal
import socket
from typing import TYPE_CHECKING

from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from pydantic import SecretStr
    from starlette.applications import Starlette


SHORTEST_TOKEN = 16
MAX_CONNECTIONS = 512
HEADER_S = 30.0
KEEP_ALIVE_S = 5


def check_address(host: str, token_variable: str, how_sent: str, token: "SecretStr | None") -> None:
    """Raise `BadInput` for an address that other machines may reach without a token, or with a short one."""
    if _is_loopback(host) or (token and len(token.get_secret_value()) >= SHORTEST_TOKEN):
        return
    found = f"the token has fewer than {SHORTEST_TOKEN} characters" if token else "no token is set"
    raise BadInput(
        f"Other machines can reach {host}, and {found}.",
        f"Set {token_variable} to a random text, which clients send {how_sent}, or listen on 127.0.0.1.",
        code="token-missing-or-short",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises `BadInput` if the address cannot be used.

    It names TCP, as asyncio needs to send the parts of an answer at once: otherwise its body waits up to 40 ms for the
    client to acknowledge its header.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, UnicodeError) as error:  # the latter for an invalid host name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadInput(f"Nothing can listen at {host}, port {port}: {reason}.", "Choose another with --port.") from None
    return listener


def shown_url(host: str, listener: socket.socket) -> str:
    """Return the address of a listening socket, with the host as the user named it."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def log_to_terminal() -> None:
    """Show slmops's log on standard error, in place of the logging that Prefect's import has set up."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, force=True)
    logging.getLogger("slmops").setLevel(logging.INFO)


async def serve_until_stopped(
    app: "Starlette",
    listener: socket.socket,
    *,
    drain_s: float,
    max_connections: int = MAX_CONNECTIONS,
    header_s: float = HEADER_S,
) -> None:
    """Serve an application until SIGINT or SIGTERM; running requests then have `drain_s` seconds to end.

    More than `max_connections` are closed at once, as is a connection whose header takes longer than `header_s`.
    """
    import asyncio

    import uvicorn

    from slmops.infra.foundry.connections import RareReports, limited_connections

    config = uvicorn.Config(
        app,
        http=limited_connections(max_connections, header_s),
        log_level="error",  # at other levels it logs each request that is not HTTP
        access_log=False,
        server_header=False,
        timeout_keep_alive=min(KEEP_ALIVE_S, math.ceil(header_s)),
        timeout_graceful_shutdown=int(drain_s),
    )
    asyncio.get_running_loop().set_exception_handler(RareReports())
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal that ended it again at its end
        signal.signal(number, lambda *_: None)
    await uvicorn.Server(config).serve(sockets=[listener])
