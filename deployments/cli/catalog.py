"""`slmops catalog`: the store's registered versions as a catalog for Foundry Local's runtime."""

import contextlib
import socket
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from slmops.deployments.cli.output import print_line
from slmops.deployments.cli.running import load_settings
from slmops.deployments.server.listening import (
    check_address,
    listen,
    log_to_terminal,
    serve_until_stopped,
    shown_url,
)
from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from slmops.infra.settings import Settings

DEFAULT_PORT = 5274
SHUTDOWN_S = 5

Host = Annotated[str, typer.Option(help="Address to listen on; one that is not loopback needs SLMOPS_CATALOG__TOKEN.")]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0: a free one.")]
Upstream = Annotated[str | None, typer.Option(help="URL of a catalog whose models are listed after ours.")]


def catalog(host: Host = "127.0.0.1", port: Port = DEFAULT_PORT, upstream: Upstream = None) -> None:
    """Serve the store's registered versions as a Foundry Local catalog, until it is stopped."""
    settings = load_settings()
    check_address(host, "SLMOPS_CATALOG__TOKEN", "in the catalog's URL", settings.catalog.token)
    _check_upstream(upstream)
    with contextlib.closing(listen(host, port)) as listener:
        _serve(host, listener, upstream, settings)


def _check_upstream(upstream: str | None) -> None:
    if upstream is None:
        return
    with contextlib.suppress(ValueError):  # an invalid port, or brackets without an address
        parts = urlsplit(upstream)
        # A password would end up in logs.
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.username is None:
            return
    raise BadInput(
        "The upstream catalog's address must be an http:// or https:// URL without a user name.", "Correct --upstream."
    )


def _serve(host: str, listener: socket.socket, upstream: str | None, settings: "Settings") -> None:
    import asyncio

    from slmops.infra.foundry.catalog import CATALOG_PATH
    from slmops.infra.foundry.catalog_server import catalog_app
    from slmops.infra.storage.opening import open_registry
    from slmops.tasks.versions.catalog import StoreCatalog

    log_to_terminal()
    registry = open_registry(settings)
    registry.objects.check()
    access = settings.catalog
    token = access.token.get_secret_value() if access.token else None
    models = StoreCatalog(registry).models
    app = catalog_app(models, upstream, token, access.allowed_hosts, access.allowed_origins)
    query = "?token=$SLMOPS_CATALOG__TOKEN" if token else ""
    print_line(f"Catalog at {shown_url(host, listener)}{CATALOG_PATH}{query}")
    asyncio.run(serve_until_stopped(app, listener, drain_s=SHUTDOWN_S))
