"""One model behind Foundry Local's own web service, in a process of its own.

The child starts the runtime on a folder that holds this model alone, over a catalog of this one entry that it answers
itself: the web service serves what a catalog names and nothing that is registered locally. Its first line of standard
input is the request, its only line of standard output is `{"ready": {"url": str, "load_ms": float}}` or `{"error":
{...}}`; it ends with its input.
"""

import asyncio
import contextlib
import json
import os
import sys
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from slmops.infra import errors
from slmops.infra.foundry.catalog import CATALOG_PATH, CatalogModel, page_document
from slmops.infra.process.supervisor import LOG_TAIL_LINES, PYTHON, child_environment

LOOPBACK = "127.0.0.1"
STOP_TIMEOUT_S = 10.0


class ModelProcess:
    """A running model: the address of its web service, and how long it took to load in ms."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, load_ms: float) -> None:
        self.url = url
        self.load_ms = load_ms
        self._process = process

    @classmethod
    async def start(
        cls, cache_dir: Path, model_id: str, size_bytes: int, *, deadline_s: float, log_path: Path
    ) -> "ModelProcess":
        """Start the model whose folder is under `cache_dir`, and wait until it is loaded.

        Raises `DeadlineExceeded`; `StageFailed` with the runtime's reason, or the end of the log.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *PYTHON,
                "-m",
                "slmops.infra.foundry.model_process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=child_environment(),
                start_new_session=os.name == "posix",  # Ctrl-C is the parent's to handle
            )
        try:
            assert process.stdin and process.stdout
            request = {"cache_dir": str(cache_dir), "model_id": model_id, "size_bytes": size_bytes}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            with contextlib.suppress(ConnectionError):  # the reason is in the log
                await process.stdin.drain()
            line = await asyncio.wait_for(process.stdout.readline(), deadline_s)
            message = json.loads(line) if line.endswith(b"\n") else {}  # else its end has cut it short
            if "ready" in message:
                return cls(process, message["ready"]["url"], message["ready"]["load_ms"])
            if "error" in message:
                raise errors.StageFailed(message["error"]["message"], message["error"]["what_to_do"])
            tail = "\n".join(log_path.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:])
            raise errors.StageFailed(f"The process of {model_id} ended.", f"The end of its log ({log_path}):\n{tail}")
        except TimeoutError:
            await _end(process)
            raise errors.DeadlineExceeded(
                f"{model_id} was not loaded within {deadline_s:.0f} s.", f"See its log: {log_path}"
            ) from None
        except BaseException:
            await _end(process)
            raise

    @property
    def has_ended(self) -> bool:
        """Whether the process runs no more."""
        return self._process.returncode is not None

    @property
    def rss_bytes(self) -> int:
        """Resident memory; 0 for a process that has ended."""
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    async def ended(self) -> int:
        """Wait until the process ends; returns its exit status."""
        return await self._process.wait()

    async def stop(self) -> None:
        """End the process; its requests are broken off."""
        await _end(self._process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


# The child's side


def _catalog_answer(model_id: str, size_bytes: int) -> dict[str, Any]:
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
    )
    return page_document([model.entry()], None, 1)


def _serve_catalog(answer: dict[str, Any]) -> str:
    body = json.dumps(answer).encode()

    class Catalog(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer((LOOPBACK, 0), Catalog)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://{LOOPBACK}:{server.server_address[1]}{CATALOG_PATH}"


def main() -> int:
    """Serve one model until standard input closes."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # native libraries print to descriptor 1 as well
    sys.stdout = sys.stderr
    from slmops.infra.foundry import runtime

    request = json.loads(sys.stdin.readline())
    catalog_url = _serve_catalog(_catalog_answer(request["model_id"], request["size_bytes"]))
    try:
        url, load_ms = runtime.start_web_service(Path(request["cache_dir"]), catalog_url, request["model_id"])
    except errors.SlmopsError as error:
        messages.write(json.dumps({"error": {"message": error.message, "what_to_do": error.what_to_do}}) + "\n")
        messages.flush()
        return 1
    messages.write(json.dumps({"ready": {"url": url, "load_ms": load_ms}}) + "\n")
    messages.flush()
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # native runtimes may hang in their static destructors
