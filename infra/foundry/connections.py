"""HTTP connections with limits: their number, and the time in which a request's header has to arrive."""

import asyncio
import logging
import os
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

LOG = logging.getLogger("slmops.serve")
FILES_OF_THE_SERVER = 64  # open files that are no connections of clients: logs, pipes, connections to the models
REPEATED_AFTER_S = 60.0


def limited_connections(max_connections: int, header_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol of a connection, with limits; more connections are closed at once."""
    most = min(max_connections, _most_files() - FILES_OF_THE_SERVER)

    class LimitedConnection(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max(1, most):
                transport.abort()
            else:
                self._await_header()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._await_header()
            else:
                self._stop_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _await_header(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(header_s, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return LimitedConnection


def _most_files() -> int:
    if os.name != "posix":
        return 1 << 20
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class RareReports:
    """An event loop's handler of errors that reports a kind of error once a minute.

    Without file descriptors, asyncio would report every attempt to accept a connection.
    """

    def __init__(self) -> None:
        self._reported: dict[str, float] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Report an error."""
        kind, now = str(context.get("message")), time.monotonic()
        if now - self._reported.get(kind, -REPEATED_AFTER_S) < REPEATED_AFTER_S:
            return
        self._reported[kind] = now
        LOG.error("%s", kind, exc_info=context.get("exception"))
