"""A server of models as far as a promotion sees it: it can be told to refuse, to wait, and what it serves is read."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from slmops.infra.storage.holders import this_process

TOKEN = "s3cret"


class ModelServer:
    """Serves versions of names (`models`); `asked` are the hand-overs that it got: (name, version, precision)."""

    def __init__(self, models: dict[str, int]) -> None:
        self.models = dict(models)
        self.asked: list[tuple[str, int, str]] = []
        self.refuses: set[int] = set()  # versions that it cannot load
        self.waits = threading.Event()  # set: hand-overs go on at once
        self.waits.set()
        self.reached = threading.Event()  # a hand-over has begun
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def answer(self, method: str, path: str, token: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and document for a request."""
        if token != f"Bearer {TOKEN}":
            return 401, {"error": {"message": "The control token is wrong.", "what_to_do": ""}}
        if (method, path) == ("GET", "/slmops/v1/models"):
            known = [{"name": name, "version": version} for name, version in self.models.items()]
            return 200, {"models": [{**known_model, "precision": "int4", "state": "ready"} for known_model in known]}
        _, _, _, _, name, what = path.split("/")
        assert (method, what) == ("POST", "champion"), path
        self.asked.append((name, asked["version"], asked["precision"]))
        self.reached.set()
        self.waits.wait(60)
        if asked["version"] in self.refuses:
            return 503, {"error": {"message": "The new version does not fit into memory.", "what_to_do": "Free some."}}
        former, self.models[name] = self.models.get(name), asked["version"]
        return 200, {"version": asked["version"], "former": former}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        model_server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer("GET", {})

            def do_POST(self) -> None:
                self._answer("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, method: str, asked: dict[str, Any]) -> None:
                token = self.headers.get("Authorization", "")
                status, document = model_server.answer(method, self.path, token, asked)
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    @contextmanager
    def running(self, home: Path, name: str = "server") -> Iterator["ModelServer"]:
        """Serve, and say so in a home directory as `slmops serve` does."""
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        file = home / "serve" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"process": this_process(), "url": self.url, "control_token": TOKEN}), "utf-8")
        file.chmod(0o600)
        try:
            yield self
        finally:
            file.unlink()
            self.waits.set()
            self._http.shutdown()
            self._http.server_close()
