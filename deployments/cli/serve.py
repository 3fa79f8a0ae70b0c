"""`slmops serve`: the registered models behind OpenAI's API."""

import contextlib
from typing import Annotated

import typer

from slmops.deployments.cli.running import load_settings
from slmops.deployments.server.listening import check_address, listen

DEFAULT_PORT = 5273

Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Models to serve; default: all, also new ones.")
]
Host = Annotated[str, typer.Option(help="Address to listen on; one that is not loopback needs SLMOPS_SERVE__TOKEN.")]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0: a free one.")]


def serve(names: Names = None, host: Host = "127.0.0.1", port: Port = DEFAULT_PORT) -> None:
    """Serve each model's champion through OpenAI's API, under the model's plain name, until it is stopped."""
    settings = load_settings()
    check_address(host, "SLMOPS_SERVE__TOKEN", "as their API key", settings.serve.token)
    with contextlib.closing(listen(host, port)) as listener:
        import asyncio

        from slmops.deployments.cli.model_server import serve_models

        asyncio.run(serve_models(names or [], host, listener, settings))
