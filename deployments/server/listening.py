"""Where a command that serves listens: loopback, or another address with a token."""

import contextlib
import ipaddress
import os
import socket

from slmops.infra.errors import BadInput


def check_address(host: str, token_variable: str, how_sent: str, *, has_token: bool) -> None:
    """Raise `BadInput` for an address that other machines may reach without a token."""
    if not _is_loopback(host) and not has_token:
        raise BadInput(
            f"Other machines could ask at {host}, and there is no token.",
            f"Set {token_variable}, which clients send {how_sent}, or listen on 127.0.0.1.",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is a free one. Raises `BadInput` where nothing can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, UnicodeError) as error:  # the latter for a host name that cannot be one
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadInput(f"Nothing can listen at {host}, port {port}: {reason}.", "Choose another with --port.") from None
    return listener
