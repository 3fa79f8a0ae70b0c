"""`slmops serve`: the registered models behind OpenAI's API."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slmops.deployments.cli.running import load_settings
from slmops.deployments.server.listening import check_address, listen
from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from slmops.infra.records import Json

DEFAULT_PORT = 5273

Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Models to serve; default: all, also new ones.")
]
Host = Annotated[str, typer.Option(help="Address to listen on; one that is not loopback needs SLMOPS_SERVE__TOKEN.")]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0: a free one.")]

ResponseSchema = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON Schema that the answers follow to requests that name no response_format and call no tools; needs "
        "one NAME.",
    ),
]


def serve(
    names: Names = None,
    host: Host = "127.0.0.1",
    port: Port = DEFAULT_PORT,
    response_schema: ResponseSchema = None,
) -> None:
    """Serve each model's champion through OpenAI's API, under the model's plain name, until it is stopped."""
    settings = load_settings()
    check_address(host, "SLMOPS_SERVE__TOKEN", "as their API key", settings.serve.token)
    schema = _read_schema(response_schema, names or []) if response_schema else None
    with contextlib.closing(listen(host, port)) as listener:
        import asyncio

        from slmops.deployments.cli.model_server import serve_models

        asyncio.run(serve_models(names or [], host, listener, settings, schema))


def _read_schema(path: Path, names: list[str]) -> "Json":
    from slmops.tasks.questions.output_format import read_output_schema

    if len(names) != 1:
        raise BadInput(
            f"--response-schema is for one model, found {len(names)} names.",
            "Name the model: slmops serve NAME --response-schema FILE.",
            code="response-schema-needs-one-name",
        )
    schema = read_output_schema(path.expanduser()).json_schema
    if not isinstance(schema, dict):
        raise BadInput(
            f"The response schema {path} allows any answer or none.",
            "Give a schema that is an object.",
            code="response-schema-not-usable",
        )
    return schema
