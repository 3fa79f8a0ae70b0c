"""The runs on a server's API whose database is busy, and whose answers are lost."""

from slmops.deployments.server.flow_runs import RunReader
from tests.support.api_faults import busy, faults_of_the_api, lost
from tests.support.prefect_api import call


def test_a_query_is_repeated_until_it_is_answered(server: str) -> None:
    flow = call("POST", f"{server}/flows/", {"name": "gc"})["id"]
    run = call("POST", f"{server}/flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
    try:
        with faults_of_the_api(busy("POST", "/flows/filter$"), lost("POST", "/flow_runs/filter$")):
            assert run in [found.id for found in RunReader(server).under_way()]
    finally:
        call("DELETE", f"{server}/flow_runs/{run}")
