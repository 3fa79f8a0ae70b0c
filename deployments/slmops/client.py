"""Deploys from programs that train models, over Prefect's API, with Python's standard library only.

from slmops.client import start_deploy, wait_for

run = start_deploy("s3://models/helpdesk-7", "helpdesk", precisions=["int4"])
print(wait_for(run)["selected"])

The environment names the server: `PREFECT_API_URL`, and `PREFECT_API_AUTH_STRING` or `PREFECT_API_KEY`.
"""

import base64
import json
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.storage.names import check_name

TIMEOUT_S = 30.0
BUSY_S = 90.0  # the API answers 503 while its database is locked, which may take a minute
SILENCE_S = 300.0  # a server that restarts does not answer for a time, and its runs go on
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
REFUSED = (401, 403, 404, 409, 422)


def start_deploy(checkpoint: str, name: str, **parameters: object) -> str:
    """Start a deploy on the server's worker, and return the id of its run.

    `checkpoint` is what `slmops deploy` takes and the worker can read; `parameters` are the flow's other ones.
    Raises `BadInput` for what the server refuses, `StageFailed` where none answers.
    """
    check_name(name)
    deployments = post("deployments/filter", {"deployments": {"name": {"any_": ["deploy"]}}})
    if not deployments:
        raise BadInput("The server has no deployment 'deploy'.", "slmops up registers it.", code="deployment-missing")
    given = {"checkpoint": checkpoint, "name": name, **parameters}
    # The key makes a repeated call return the run that the first one started.
    body = {"parameters": given, "idempotency_key": str(uuid.uuid4())}
    return str(post(f"deployments/{deployments[0]['id']}/create_flow_run", body)["id"])


def wait_for(run: str, timeout_s: float = 86_400, poll_s: float = 5) -> dict[str, Any]:
    """Wait for the end of a run, and return the document that `slmops deploy --json` prints.

    A rejected model is a result: see the document's `status`. Raises `StageFailed` for a run that ended without a
    document, with its message, and for one that has not ended in time.
    """
    deadline = time.monotonic() + timeout_s
    while (state := _state_of(run)).get("type") not in ENDED:
        if time.monotonic() > deadline:
            raise StageFailed(f"The run {run} has not ended within {timeout_s:g} s.", "Wait for it again.")
        time.sleep(poll_s)
    posted = {"flow_run_id": {"any_": [run]}, "type": {"any_": ["json"]}}
    for artifact in post("artifacts/filter", {"artifacts": posted, "sort": "CREATED_DESC"}):
        if str(artifact["key"]).endswith("-document"):
            document: dict[str, Any] = json.loads(artifact["data"])
            return document
    raise StageFailed(state.get("message") or f"The run ended as {state.get('name')}.")


def post(path: str, body: object) -> Any:
    """Post to Prefect's API and return its answer, None for an empty one; a busy server is asked again.

    Raises `BadInput` for a call that it refuses, `StageFailed` where no server answers.
    """
    deadline = time.monotonic() + BUSY_S
    while True:
        request = _request(path, body)
        try:
            with urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310  # `_request` takes HTTP only
                content = answer.read()
                return json.loads(content) if content else None
        except HTTPError as error:
            if error.code in REFUSED:
                raise BadInput(
                    f"Prefect's API refused the call: {_reason(error)}.",
                    "Correct it, or PREFECT_API_URL or PREFECT_API_AUTH_STRING.",
                    code="call-refused",
                ) from None
            if error.code != 503 or time.monotonic() > deadline:
                raise _no_answer(request, error) from error
        except (OSError, ValueError) as error:
            raise _no_answer(request, error) from error
        time.sleep(1)


def _state_of(run: str) -> Mapping[str, Any]:
    deadline = time.monotonic() + SILENCE_S
    while True:
        try:
            found = post("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        except StageFailed:
            if time.monotonic() > deadline:
                raise
            time.sleep(5)
            continue
        if not found:
            raise BadInput(f"The server has no run {run}.", "Use the id that start_deploy returned.")
        return found[0]["state"] or {}


def _request(path: str, body: object) -> Request:
    url = os.environ.get("PREFECT_API_URL", "")
    if not url.startswith(("http://", "https://")):
        fault = f"PREFECT_API_URL is {url!r}" if url else "No Prefect server is set"
        raise BadInput(f"{fault}.", "Set PREFECT_API_URL, such as http://127.0.0.1:4200/api.")
    password, key = os.environ.get("PREFECT_API_AUTH_STRING"), os.environ.get("PREFECT_API_KEY")
    headers = {"Content-Type": "application/json", "User-Agent": "slmops"}
    if password:
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    elif key:
        headers["Authorization"] = f"Bearer {key}"
    return Request(f"{url.rstrip('/')}/{path}", json.dumps(body).encode(), headers)  # noqa: S310


def _reason(error: HTTPError) -> str:
    try:
        return str(json.loads(error.read())["detail"]).rstrip(".")
    except (OSError, ValueError, KeyError, TypeError):
        return f"status {error.code}"


def _no_answer(request: Request, error: Exception) -> StageFailed:
    return StageFailed(
        f"Prefect's server at {request.full_url} did not answer: {error}.",
        "Send it again: a second deploy of the same checkpoint builds nothing new.",
        code="no-server-answers",
    )
