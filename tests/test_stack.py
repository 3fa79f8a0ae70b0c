"""The composed Prefect server, natively: PostgreSQL, Redis, API and background services in processes of their own."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tests.stack import IS_INSTALLED, MISSING, Stack, running_stack
from tests.test_compose import FILE, read_by_compose

pytestmark = [
    pytest.mark.skipif(not IS_INSTALLED, reason=MISSING),
    pytest.mark.xdist_group("stack"),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(read_by_compose(FILE)["services"], tmp_path_factory.mktemp("stack")) as running:
        yield running


def test_the_api_wants_its_authentication(stack: Stack) -> None:
    url = f"{stack.api_url}/flows/filter"
    assert httpx.post(url, json={}).status_code == httpx.codes.UNAUTHORIZED
    assert httpx.post(url, json={}, auth=stack.auth).json() == []


def test_background_services_schedule_and_a_killed_api_loses_nothing(stack: Stack) -> None:
    with httpx.Client(base_url=stack.api_url, auth=stack.auth, timeout=30) as api:
        flow = api.post("/flows/", json={"name": "nightly"}).json()["id"]
        schedule = {"interval": 3600, "anchor_date": (datetime.now(UTC) + timedelta(seconds=5)).isoformat()}
        made = api.post(
            "/deployments/",
            json={"name": "nightly", "flow_id": flow, "schedules": [{"schedule": schedule, "active": True}]},
        )
        made.raise_for_status()
        stack.stop("prefect-api")
        stack.start("prefect-api")
        stack.wait_for_api()
        states: set[str] = set()
        deadline = time.monotonic() + 120
        while "Late" not in states:  # only the background services mark a run that nobody took as late
            assert time.monotonic() < deadline, (states, stack.said("prefect-services"))
            time.sleep(0.5)
            runs = api.post("/flow_runs/filter", json={}).json()
            states = {run["state_name"] for run in runs}
