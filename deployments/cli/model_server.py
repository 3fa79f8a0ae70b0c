"""What `slmops serve` runs: the store's champions behind OpenAI's API, until it is stopped."""

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

from slmops.deployments.cli.output import print_line, print_note
from slmops.deployments.server.listening import log_to_terminal, serve_until_stopped, shown_url
from slmops.infra.errors import BadInput
from slmops.infra.records import Json
from slmops.infra.settings import Settings


async def serve_models(
    names: list[str], host: str, listener: socket.socket, settings: Settings, response_schema: Json | None = None
) -> None:
    """Serve the named models, or all, on a socket that listens; `host` is only for messages.

    `response_schema` is the JSON Schema of answers to requests that name no response format; it needs one name.
    """
    from slmops.infra.foundry.following import Following
    from slmops.infra.foundry.model_host import ModelHost
    from slmops.infra.foundry.openai_server.app import openai_server
    from slmops.infra.foundry.openai_server.default_format import check_format, format_of
    from slmops.infra.storage.opening import open_registry
    from slmops.tasks.versions.serving import StoredModels

    log_to_terminal()
    source = StoredModels(open_registry(settings), settings)
    models = ModelHost(source, settings.serve, settings.cache_dir / "serving", settings.cache_dir / "logs")
    default_format = format_of(response_schema) if response_schema else None
    control_token = secrets.token_urlsafe(32)
    try:
        await models.start(names)
        if not models.champions:
            _wait_for_the_first(settings)
        if default_format:
            await check_format(models, names[0], default_format)
        following = Following(models, source, settings.serve.follow_s, takes_new_names=not names)
        app = openai_server(models, following, settings.serve, control_token, default_format)
        own = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104  (it is only compared)
        with _announced(settings.home_dir / "serve", shown_url(own, listener), control_token):
            for name, served in models.champions.items():
                print_line(f"{name} is {served.model_id} ({served.precision}).")
            if settings.serve.token:
                print_note(
                    "note: the models' own ports on loopback, which the runtime opens, know no token: other users of "
                    "this machine can reach them."
                )
            print_line(f"Serving at {shown_url(host, listener)}/v1")
            async with following.running():
                await serve_until_stopped(
                    app,
                    listener,
                    drain_s=settings.serve.drain_s + 1,
                    max_connections=settings.serve.max_connections,
                    header_s=settings.serve.receive_timeout_s,
                )
    finally:
        await models.close()


def _wait_for_the_first(settings: Settings) -> None:
    if not settings.serve.follow_s:
        raise BadInput("The store has no champion to serve.", "Deploy a model first: slmops deploy, or slmops demo.")
    print_note(f"note: {settings.store_uri} has no champion yet; the first one is served as soon as it exists.")


@contextlib.contextmanager
def _announced(folder: Path, url: str, control_token: str) -> Iterator[None]:
    """Let this user's other commands find the server, so that a promotion reaches it."""
    from slmops.infra.files import write_whole
    from slmops.infra.storage.holders import this_process

    path = folder / f"{os.getpid()}.json"
    record = {"process": this_process(), "url": url, "control_token": control_token}
    write_whole(path, json.dumps(record), mode=0o600)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
