"""One model in Foundry Local's own web service, in a process of its own.

The child starts the runtime on a folder that contains only this model, with a catalog of one entry that the child
serves itself. The web service serves models of a catalog, but no models that are registered locally. Its first line of
standard input is the request, its only line of standard output is `{"ready": {"url": str, "load_ms": float}}` or
`{"error": {...}}`; it ends with its input.
"""

import asyncio
import json
import os
import sys
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil

from slmops.infra import errors
from slmops.infra.foundry.catalog import CATALOG_PATH, CatalogModel, page_document
from slmops.infra.process.channel import (
    Channel,
    child_environment,
    end_of_log,
    error_of,
    keeping_memory,
    listen,
    message_of,
    speak,
)
from slmops.infra.reasoning import ThoughtMarks
from slmops.infra.records import Json

LOOPBACK = "127.0.0.1"
STOP_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.1


class ModelProcess:
    """A running model: the address of its web service, and how long it took to load in ms."""

    def __init__(self, channel: Channel, url: str, load_ms: float) -> None:
        self.url = url
        self.load_ms = load_ms
        self._channel = channel

    @classmethod
    async def start(
        cls,
        cache_dir: Path,
        model_id: str,
        size_bytes: int,
        *,
        marks: ThoughtMarks | None = None,
        deadline_s: float,
        log_path: Path,
    ) -> "ModelProcess":
        """Start the model in the folder under `cache_dir`, and wait until it is loaded.

        The runtime takes thoughts between `marks` out of answers' content.

        Raises `DeadlineExceeded`; `StageFailed` with the runtime's reason, or the end of the log.
        """
        channel = await asyncio.to_thread(
            Channel,
            "slmops.infra.foundry.model_process",
            log_path=log_path,
            environment=child_environment(keeping_memory()),
        )
        try:
            shown = marks.model_dump(mode="json") if marks else None
            place = {"cache_dir": str(cache_dir.absolute()), "model_id": model_id, "size_bytes": size_bytes}
            channel.send({**place, "marks": shown})
            message = await asyncio.to_thread(channel.receive, deadline_s)
            if message is None:
                raise errors.StageFailed(f"The process of {model_id} ended.", end_of_log(log_path))
            if "error" in message:
                raise error_of(message["error"])
            return cls(channel, message["ready"]["url"], message["ready"]["load_ms"])
        except TimeoutError:
            await asyncio.to_thread(channel.end, STOP_TIMEOUT_S)
            raise errors.DeadlineExceeded(
                f"{model_id} was not loaded within {deadline_s:.0f} s.", f"See its log: {log_path}"
            ) from None
        except BaseException:
            await asyncio.to_thread(channel.end, STOP_TIMEOUT_S)
            raise

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._channel.status is not None

    @property
    def rss_bytes(self) -> int:
        """Resident memory; 0 for a process that has ended."""
        try:
            return int(psutil.Process(self._channel.pid).memory_info().rss)
        except psutil.Error:
            return 0

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._channel.pid

    async def ended(self) -> int:
        """Wait until the process ends; returns its exit status."""
        while (status := self._channel.status) is None:
            await asyncio.sleep(POLL_INTERVAL_S)
        return status

    async def stop(self) -> None:
        """End the process; its running requests fail."""
        await asyncio.to_thread(self._channel.end, STOP_TIMEOUT_S)


# The child's side


def _catalog_answer(model_id: str, size_bytes: int, marks: ThoughtMarks | None) -> Json:
    name, _, version = model_id.rpartition(":")
    model = CatalogModel(
        name=name,
        version=int(version),
        alias=name,
        device="cpu",
        execution_provider="CPUExecutionProvider",
        size_bytes=size_bytes,
        display_name=name,
        created_at=datetime.now(UTC).isoformat(),
        reasoning=(marks.start, marks.end) if marks else None,
    )
    return page_document([model.entry()], None, 1)


def _serve_catalog(answer: Json) -> str:
    body = json.dumps(answer).encode()

    class Catalog(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((LOOPBACK, 0), Catalog)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://{LOOPBACK}:{server.server_address[1]}{CATALOG_PATH}"


def main() -> int:
    """Serve one model until standard input closes."""
    send = speak()
    from slmops.infra.foundry import runtime

    request = next(listen(lambda: os._exit(0)))  # native runtimes may hang in their static destructors
    marks = ThoughtMarks.model_validate(request["marks"]) if request["marks"] else None
    catalog_url = _serve_catalog(_catalog_answer(request["model_id"], request["size_bytes"], marks))
    try:
        url, load_ms = runtime.start_web_service(Path(request["cache_dir"]), catalog_url, request["model_id"])
    except errors.SlmopsError as error:
        send(message_of(error))
        return 1
    send({"ready": {"url": url, "load_ms": load_ms}})
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # native runtimes may hang in their static destructors
