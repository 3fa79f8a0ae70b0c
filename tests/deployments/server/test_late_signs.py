"""A run that was declared crashed and then gives a sign of life, on a real Prefect server with slmops' automation."""

import time
from datetime import UTC, datetime
from uuid import uuid4

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Running

from slmops.deployments.server import automations, notices
from slmops.deployments.server.registration import read_deployments, register_deployments
from slmops.deployments.server.work_pool import DEFAULT_POOL, ensure_pool
from slmops.infra.server_settings import PREFECT_TAG
from slmops.infra.settings import Settings
from tests.support.api_faults import faults_of_the_api, lost
from tests.support.prefect_api import call, registering_anew

DEADLINE_S = 240


@flow
def deploying() -> None:
    """A flow whose run is only a record: the test is its process."""


def test_a_late_sign_of_life_withdraws_the_verdict(server: str) -> None:
    wanted = automations.automations(uuid4(), lost_after_s=90)
    (withdrawing,) = [automation for automation in wanted if automation.name == automations.LATE_SIGNS]
    with (
        registering_anew(server),
        temporary_settings({PREFECT_API_URL: server}),
        get_client(sync_client=True) as client,
    ):
        withdrawing.create()
        run = client.create_flow_run(deploying, tags=[PREFECT_TAG], state=Running())
        client.set_flow_run_state(run.id, Crashed(message="No sign of life for 90 s."))
        deadline = time.monotonic() + DEADLINE_S
        while (state := client.read_flow_run(run.id).state) and state.type != StateType.RUNNING:
            assert time.monotonic() < deadline, state
            sign = {
                "id": str(uuid4()),
                "event": automations.HEARTBEAT,
                "occurred": datetime.now(UTC).isoformat(),
                "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}"},
                "related": [notices.OF_OURS],
            }
            call("POST", f"{server}/events", [sign])
            time.sleep(0.2)
        assert state and state.message == "It gave a late sign of life."


def test_each_automation_is_set_up_once_though_the_server_confirms_nothing(server: str, settings: Settings) -> None:
    with (
        registering_anew(server),
        temporary_settings({PREFECT_API_URL: server}),
        get_client(sync_client=True) as client,
    ):
        ensure_pool(DEFAULT_POOL)
        register_deployments([entry for entry in read_deployments() if entry["name"] == "deploy"])
        with faults_of_the_api(lost("POST", "/automations/$", times=2), lost("DELETE", "/automations/")):
            names = automations.register_automations(settings, "a test")
        assert [len(client.read_automations_by_name(name)) for name in names] == [1] * len(names)
