"""`slmops catalog`: the store's registered versions as a catalog that Foundry Local's runtime asks."""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
from typing import Annotated
from urllib.parse import urlsplit

import typer

from deployments.console import print_line
from infra.errors import BadInput
from infra.settings import Settings, load_settings

DEFAULT_PORT = 5274
SHUTDOWN_S = 5

Host = Annotated[str, typer.Option(help="Address to listen on; any but loopback takes SLMOPS_CATALOG__TOKEN.")]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0: a free one.")]
Upstream = Annotated[str | None, typer.Option(help="URL of a catalog whose models are listed after ours.")]


def add_catalog_command(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command()(catalog)


def catalog(host: Host = "127.0.0.1", port: Port = DEFAULT_PORT, upstream: Upstream = None) -> None:
    """Serve the store's registered versions as a Foundry Local catalog, until it is stopped."""
    settings = load_settings()
    _check_address(host, settings)
    _check_upstream(upstream)
    with contextlib.closing(_listen(host, port)) as listener:
        _serve(host, listener, upstream, settings)


def _check_address(host: str, settings: Settings) -> None:
    if not _is_loopback(host) and not settings.catalog.token:
        raise BadInput(
            f"Other machines could ask at {host}, and there is no token.",
            "Set SLMOPS_CATALOG__TOKEN, which the catalog's URL then carries, or listen on 127.0.0.1.",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _check_upstream(upstream: str | None) -> None:
    if upstream is None:
        return
    with contextlib.suppress(ValueError):  # a port that is none, brackets that hold no address
        parts = urlsplit(upstream)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    raise BadInput("The upstream catalog's address is no http:// or https:// URL.", "Correct --upstream.")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadInput(f"Nothing can listen at {host}, port {port}: {reason}.", "Choose another with --port.") from None
    return listener


def _serve(host: str, listener: socket.socket, upstream: str | None, settings: Settings) -> None:
    from deployments.prefect_environment import prepare_prefect

    prepare_prefect(settings)  # before `tasks` is imported
    import uvicorn

    from infra.foundry.catalog import CATALOG_PATH
    from infra.foundry.catalog_server import catalog_app
    from infra.storage.opening import open_registry
    from tasks.catalog import StoreCatalog

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    registry = open_registry(settings)
    registry.objects.check()
    token = settings.catalog.token.get_secret_value() if settings.catalog.token else None
    app = catalog_app(StoreCatalog(registry).models, upstream, token)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN_S)
    )
    shown = f"[{host}]" if ":" in host else host
    query = "?token=$SLMOPS_CATALOG__TOKEN" if token else ""
    print_line(f"Catalog at http://{shown}:{listener.getsockname()[1]}{CATALOG_PATH}{query}")
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what ended it again, when all is done
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
