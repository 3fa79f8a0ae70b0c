"""Calls of tests to a Prefect server's API, which answers 503 at once while another writer has its SQLite database.

Every test calls it through this module: a call is repeated until the server has answered it. Prefect's own client does
the same, but waits for seconds between its attempts.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

ATTEMPT_S = 90.0  # SQLite's waits for its lock end after 60 s, and then the answer comes
PATIENCE_S = 240.0
PAUSE_S = 0.2


class PatientTransport(httpx.HTTPTransport):
    """Sends a request again after a fault of the connection and after a 503, until `PATIENCE_S` has passed.

    A request whose answer was lost may have been done: a repeated one is answered as the second of two.
    """

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """See `httpx.HTTPTransport`."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = super().handle_request(request)
                if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                    return answer
                answer.close()
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(PAUSE_S)


def answer_of(method: str, url: str, **options: Any) -> httpx.Response:
    """Call the API, and return its answer, whatever that is; `options` are those of `httpx.Client.request`."""
    with httpx.Client(transport=PatientTransport(), timeout=ATTEMPT_S) as client:
        return client.request(method, url, **options)


def call(method: str, url: str, body: Any = None) -> Any:
    """Return the API's answer to an accepted call, or None."""
    answer = answer_of(method, url, json=body).raise_for_status()
    return answer.json() if answer.content else None


def query(api: str, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the objects of a kind, such as `flow_runs`, that match a filter."""
    found: list[dict[str, Any]] = call("POST", f"{api}/{path}/filter", body)
    return found


@contextmanager
def registering_anew(api: str) -> Iterator[None]:
    """Remove the deployments and automations that other tests left on a server, and at the end those of this one."""
    _unregister_all(api)
    try:
        yield
    finally:
        _unregister_all(api)


def _unregister_all(api: str) -> None:
    for kind in ("automations", "deployments"):
        for registered in query(api, kind):
            answer_of("DELETE", f"{api}/{kind}/{registered['id']}")


def wait_for_lineage(api: str, expected: Mapping[str, Collection[str]]) -> None:
    """Wait until the server has the events, sent in the background, that each asset was made from these assets."""
    deadline = time.monotonic() + PATIENCE_S
    made = {"event": {"name": ["prefect.asset.materialization.succeeded"]}, "resource": {"id": [*expected]}}
    found: dict[str, set[str]] = {}
    while not all({*sources} <= found.get(key, set()) for key, sources in expected.items()):
        assert time.monotonic() < deadline, found
        time.sleep(PAUSE_S)
        for event in call("POST", f"{api}/events/filter", {"filter": made})["events"]:
            sources = found.setdefault(event["resource"]["prefect.resource.id"], set())
            parts = [part for part in event["related"] if part["prefect.resource.role"] == "asset"]
            sources |= {part["prefect.resource.id"] for part in parts}
