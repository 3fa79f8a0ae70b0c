"""The names of flow runs, on a real server."""

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.tasks.runs.names import run_name


@flow(name="names", flow_run_name=run_name("deploy-{name}"))
def names(name: str) -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "deploy-home"),
        ("fluffy-otter", "deploy-home"),
        ("Release of May", "Release of May"),
        ("candidate_7", "candidate_7"),
    ],
)
def test_a_typed_name_stays_and_a_made_one_says_what_the_run_does(
    server: str, given: str | None, expected: str
) -> None:
    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        run = client.create_flow_run(names, parameters={"name": "home"}, name=given)
        run_flow(names, flow_run=run, parameters={"name": "home"})
        assert client.read_flow_run(run.id).name == expected
