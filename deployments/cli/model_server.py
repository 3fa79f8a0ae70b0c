"""What `slmops serve` runs: the store's champions behind OpenAI's API, until it is stopped."""

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from slmops.deployments.cli.output import print_line, print_note
from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings


async def serve_models(names: list[str], host: str, listener: socket.socket, settings: Settings) -> None:
    """Serve the named models, or all, on a socket that listens; `host` is what was asked for, and is only shown."""
    import uvicorn

    from slmops.infra.foundry.model_host import ModelHost
    from slmops.infra.foundry.openai_server import openai_server, served
    from slmops.infra.storage.opening import open_registry
    from slmops.tasks.versions.serving import StoredModels

    # Prefect, which the imports above bring, has set up logging for its own commands.
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, force=True)
    logging.getLogger("slmops").setLevel(logging.INFO)
    source = StoredModels(open_registry(settings), settings)
    models = ModelHost(source, settings.serve, settings.cache_dir / "serving", settings.cache_dir / "logs")
    control_token = secrets.token_urlsafe(32)
    shown = f"[{host}]" if ":" in host else host
    port = listener.getsockname()[1]

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with served(models, settings.serve):
            yield

    try:
        await models.start(names)
        if not models.champions:
            _wait_for_the_first(settings)
        for notice in source.notices:
            print_note(f"note: {notice}")
        app = openai_server(models, settings.serve, control_token, lifespan)
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(settings.serve.drain_s) + 1
            )
        )
        own = "127.0.0.1" if shown in ("0.0.0.0", "[::]") else shown  # noqa: S104  (it is only compared)
        with _announced(settings.home_dir / "serve", f"http://{own}:{port}", control_token):
            for name, one in models.champions.items():
                print_line(f"{name} is {one.model_id} ({one.precision}).")
            print_line(f"Serving at http://{shown}:{port}/v1")
            for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what ended it again, when all is done
                signal.signal(number, lambda *_: None)
            await server.serve(sockets=[listener])
    finally:
        await models.close()


def _wait_for_the_first(settings: Settings) -> None:
    if not settings.serve.follow_s:
        raise BadInput("The store has no champion to serve.", "Deploy a model first: slmops deploy, or slmops demo.")
    print_note(f"note: {settings.store_uri} has no champion yet; the first one will be served as soon as it is there.")


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
