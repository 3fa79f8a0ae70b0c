"""A conversation with a registered model: a process keeps the model loaded, and each message is one JSON line.

To the child's standard input go requests (`{"messages": [...], "max_new_tokens": int, "search": {...} or null}`); from
its standard output come `{"ready": {"load_ms": float}}` once, then per request `{"text": str}` for each piece and
`{"done": {...}}` with `slmops.infra.foundry.runtime.answer`'s result, or `{"error": {...}}`. It ends with its input.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from slmops.infra.errors import SlmopsError, StageFailed
from slmops.infra.foundry import runtime
from slmops.infra.process.channel import (
    Channel,
    Message,
    child_environment,
    end_of_log,
    error_of,
    listen,
    message_of,
    speak,
)
from slmops.infra.records import Json

CLOSE_TIMEOUT_S = 2


class FoundryChat:
    """A loaded model for a conversation; a context manager that ends the model's process.

    `last` holds the last answer's record (see `slmops.infra.foundry.runtime.answer`). Raises `StageFailed` when the
    model is not registered or does not load.
    """

    def __init__(self, cache_dir: Path, model_id: str, *, log_path: Path) -> None:
        runtime.check_model_id(model_id)
        self.last: Json = {}
        self._log_path = log_path
        self._channel = Channel(
            "slmops.infra.foundry.chat",
            str(cache_dir.absolute()),
            model_id,
            log_path=log_path,
            environment=child_environment(),
        )
        try:
            self.load_ms: float = self._receive()["ready"]["load_ms"]
        except BaseException:
            self.close()
            raise

    def answer(
        self, messages: Sequence[dict[str, str]], max_new_tokens: int, search: Json | None = None
    ) -> Iterator[str]:
        """Yield the answer to the conversation `messages` piece by piece; greedy unless `search` sets other options.

        Raises `StageFailed` when the conversation does not fit; a shorter one may follow.
        """
        self._channel.send({"messages": list(messages), "max_new_tokens": max_new_tokens, "search": search})
        while "done" not in (message := self._receive()):
            yield message["text"]
        self.last = message["done"]

    def close(self) -> None:
        """End the model's process."""
        self._channel.end(CLOSE_TIMEOUT_S)

    def __enter__(self) -> "FoundryChat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> Message:
        message = self._channel.receive()
        if message is None:
            raise StageFailed("The model's process ended.", end_of_log(self._log_path))
        if "error" in message:
            raise error_of(message["error"])
        return message


def main() -> int:
    """Serve one conversation: `python -m slmops.infra.foundry.chat CACHE_DIR MODEL_ID`."""
    send = speak()
    requests = listen(lambda: os._exit(0))
    try:
        model, load_ms = runtime.load(runtime.open_local_catalog(Path(sys.argv[1])), sys.argv[2])
    except SlmopsError as error:
        send(message_of(error))
        return 1
    send({"ready": {"load_ms": load_ms}})
    for request in requests:
        try:
            done = runtime.answer(
                model,
                request["messages"],
                request["max_new_tokens"],
                on_text=lambda text: send({"text": text}),
                search=request["search"],
            )
        except SlmopsError as error:
            send(message_of(error))
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
