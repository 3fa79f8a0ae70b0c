"""How a command serves: on loopback, or on another address with a token, until it is stopped."""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING

from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from starlette.applications import Starlette


def check_address(host: str, token_variable: str, how_sent: str, *, has_token: bool) -> None:
    """Raise `BadInput` for an address that other machines may reach without a token."""
    if not _is_loopback(host) and not has_token:
        raise BadInput(
            f"Other machines can reach {host}, and no token is set.",
            f"Set {token_variable}, which clients send {how_sent}, or listen on 127.0.0.1.",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises `BadInput` if the address cannot be used."""
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


async def serve_until_stopped(app: "Starlette", listener: socket.socket, *, drain_s: float) -> None:
    """Serve an application until SIGINT or SIGTERM; running requests then have `drain_s` seconds to end."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(drain_s))
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal that ended it again at its end
        signal.signal(number, lambda *_: None)
    await uvicorn.Server(config).serve(sockets=[listener])
