"""Faults of the connection to a Prefect server, injected into this process's calls of a real one."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from prefect.client import base

# As the server answers while SQLite is locked.
LOCKED = {"exception_message": "Service Unavailable"}


@dataclass
class Fault:
    """What happens to the first `times` calls of a method to paths in which a pattern is found.

    Either the server answers 503 and does nothing, or (`is_lost`) it does what was asked, and its answer is lost.
    """

    method: str
    pattern: str
    is_lost: bool = False
    times: int = 1
    hits: list[str] = field(default_factory=list)

    def is_due(self, request: httpx.Request) -> bool:
        """Whether the fault is to hit this request."""
        meant = request.method == self.method and re.search(self.pattern, request.url.path)
        return bool(meant) and len(self.hits) < self.times


def busy(method: str, pattern: str, times: int = 1) -> Fault:
    """The server's database is locked."""
    return Fault(method, pattern, times=times)


def lost(method: str, pattern: str, times: int = 1) -> Fault:
    """The server's answer is lost after it has done what was asked."""
    return Fault(method, pattern, is_lost=True, times=times)


@contextmanager
def faults_of_the_api(*faults: Fault) -> Iterator[None]:
    """Let these faults hit calls of this process, also those of Prefect's synchronous client; each has to hit."""
    send: Callable[[httpx.HTTPTransport, httpx.Request], httpx.Response] = httpx.HTTPTransport.handle_request
    pause, injected = base.clamped_poisson_interval, list[Fault]()

    def faulty(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        due = next((fault for fault in faults if fault.is_due(request)), None)
        if due and not due.is_lost:
            due.hits.append(request.url.path)
            return httpx.Response(503, json=LOCKED, headers={"Retry-After": "0"}, request=request)
        answer = send(transport, request)
        # A server that is really busy has not done what was asked: the client asks again.
        if due and answer.is_success:
            due.hits.append(request.url.path)
            answer.read()
            answer.close()
            injected.append(due)
            raise httpx.ReadError("the answer was lost", request=request)
        return answer

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(httpx.HTTPTransport, "handle_request", faulty)
        # Prefect's client waits for seconds only after faults that are the server's own.
        patched.setattr(
            base, "clamped_poisson_interval", lambda *of: 0.05 if injected and injected.pop() else pause(*of)
        )
        yield
    missed = [fault for fault in faults if not fault.hits]
    assert missed == [], missed
