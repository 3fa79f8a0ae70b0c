"""A conversation with a registered model: one process that keeps it loaded, one JSON line per message.

To the child's standard input go requests (`{"messages": [...], "max_new_tokens": int, "search": {...} or null}`); from
its standard output come `{"ready": {"load_ms": float}}` once, then per request `{"text": str}` for each piece and
`{"done": {...}}` with `slmops.infra.foundry.runtime.answer`'s result, or `{"error": {...}}`. It ends with its input.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from slmops.infra import errors
from slmops.infra.foundry import runtime
from slmops.infra.process.supervisor import LOG_TAIL_LINES, PYTHON, child_environment

CLOSE_TIMEOUT_S = 2


class FoundryChat:
    """A loaded model to talk to; a context manager that ends the process behind it.

    `last` holds the last answer's record (see `slmops.infra.foundry.runtime.answer`). Raises `StageFailed` when the
    model is not registered or does not load.
    """

    def __init__(self, cache_dir: Path, model_id: str, *, log_path: Path) -> None:
        runtime.check_model_id(model_id)
        self.last: dict[str, Any] = {}
        self._log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*PYTHON, "-m", "slmops.infra.foundry.chat", str(cache_dir), model_id],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=child_environment(),
                start_new_session=os.name == "posix",  # Ctrl-C is the parent's to handle
            )
        try:
            self.load_ms: float = self._receive()["ready"]["load_ms"]
        except BaseException:
            self.close()
            raise

    def answer(
        self, messages: Sequence[dict[str, str]], max_new_tokens: int, search: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """Yield the answer to the whole conversation `messages` piece by piece; greedy unless `search` says otherwise.

        Raises `StageFailed` when the conversation does not fit; a shorter one may be asked afterwards.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the reason is in the child's log, which _receive shows
            self._process.stdin.write(
                json.dumps({"messages": list(messages), "max_new_tokens": max_new_tokens, "search": search}) + "\n"
            )
            self._process.stdin.flush()
        while "done" not in (message := self._receive()):
            yield message["text"]
        self.last = message["done"]

    def close(self) -> None:
        """End the process behind the conversation."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "FoundryChat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log_path.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:])
            raise errors.StageFailed("The model's process ended.", f"The end of its log ({self._log_path}):\n{tail}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            error = message["error"]
            kind: type[errors.SlmopsError] = getattr(errors, error["kind"])
            raise kind(error["message"], error["what_to_do"])
        return message


def main() -> int:
    """Serve one conversation: `python -m slmops.infra.foundry.chat CACHE_DIR MODEL_ID`."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # native libraries print to descriptor 1 as well
    sys.stdout = sys.stderr

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    def send_error(error: errors.SlmopsError) -> None:
        send({"error": {"kind": type(error).__name__, "message": error.message, "what_to_do": error.what_to_do}})

    try:
        model, load_ms = runtime.load(runtime.open_local_catalog(Path(sys.argv[1])), sys.argv[2])
    except errors.SlmopsError as error:
        send_error(error)
        return 1
    send({"ready": {"load_ms": load_ms}})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            done = runtime.answer(
                model,
                request["messages"],
                request["max_new_tokens"],
                on_text=lambda text: send({"text": text}),
                search=request["search"],
            )
        except errors.SlmopsError as error:
            send_error(error)
        else:
            send({"done": asdict(done)})
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except BrokenPipeError:  # the parent is gone
        code = 1
    sys.stderr.flush()
    os._exit(code)  # native runtimes may hang in their static destructors
