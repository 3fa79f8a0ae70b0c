"""The automations of `slmops up`: they deploy on an event, send notices, and find lost runs."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from slmops.deployments.server.notices import (
    NOTICES,
    OF_OURS,
    RUN_FAILURES,
    RUNS,
    at_once,
    is_owned_by,
    notices,
    run_events,
)
from slmops.events import CHECKPOINT_READY
from slmops.infra.settings import Settings

if TYPE_CHECKING:
    from prefect.automations import Automation, EventTrigger, Posture
    from prefect.client.orchestration import SyncPrefectClient

NOT_IN_EVENT = "(the event names no checkpoint or no model)"
DEPLOY_ON_EVENT = "slmops: deploy a checkpoint that is ready"
LOST_RUNS = "slmops: a run without a sign of life has crashed"
LATE_SIGNS = "slmops: a late sign of life withdraws that a run has crashed"

# A process that hung for longer than this has lost its work in any case.
LATE_UNTIL = timedelta(days=1)

# The shortest interval that Prefect accepts. It is in workers' environments, and their runs inherit it.
HEARTBEAT_VARIABLE = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
HEARTBEAT_S = 30

HEARTBEAT = "prefect.flow-run.heartbeat"
CRASHED = "prefect.flow-run.Crashed"
ENDED = (*RUN_FAILURES, "Completed", "Cancelled", "Paused", "Suspended")


def automations(deploy_id: UUID, *, lost_after_s: float) -> list["Automation"]:
    """Return the automations of every server, ready to be created."""
    from prefect.automations import Automation, ChangeFlowRunState, Posture, RunDeployment
    from prefect.client.schemas.objects import StateType

    return [
        Automation(
            name=DEPLOY_ON_EVENT,
            description="A training run emits slmops.checkpoint.ready, and its checkpoint is deployed.",
            trigger=at_once({CHECKPOINT_READY}, "slmops.model.*"),
            actions=[
                RunDeployment(
                    source="selected",
                    deployment_id=deploy_id,
                    parameters={
                        # Prefect's API makes no run with an empty value, and only the event feed would show that.
                        # With these the run fails, which its page and the notices say.
                        "checkpoint": _template(
                            "{{ event.payload.checkpoint if event.payload.checkpoint and event.payload.name"
                            f" else '{NOT_IN_EVENT}' }}}}"
                        ),
                        "name": _template("{{ event.payload.name or 'unnamed' }}"),
                        "training_run": {
                            "__prefect_kind": "json",
                            "value": _template("{{ event.payload.get('training_run') | tojson }}"),
                        },
                    },
                )
            ],
        ),
        Automation(
            name=LOST_RUNS,
            description="A worker was killed or lost its network: its run is marked as crashed.",
            trigger=_of_each_run(
                Posture.Proactive, HEARTBEAT, {HEARTBEAT, *run_events(ENDED)}, timedelta(seconds=lost_after_s)
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED, name="Crashed", message=f"No sign of life for {lost_after_s:g} s."
                )
            ],
        ),
        Automation(
            name=LATE_SIGNS,
            description="A worker was under load, or without network for a time: its run goes on.",
            trigger=_of_each_run(Posture.Reactive, CRASHED, {HEARTBEAT}, LATE_UNTIL),
            actions=[
                ChangeFlowRunState(state=StateType.RUNNING, name="Running", message="It gave a late sign of life.")
            ],
        ),
    ]


def _of_each_run(posture: "Posture", after: str, events: set[str], within: timedelta) -> "EventTrigger":
    """A trigger for each run: one of `events` comes `within` a time `after` another, or (proactive) none does."""
    from prefect.automations import EventTrigger

    return EventTrigger(
        match={"prefect.resource.id": RUNS},
        match_related=OF_OURS,
        after={after},
        expect=events,
        for_each={"prefect.resource.id"},
        posture=posture,
        threshold=1,
        within=within,
    )


def _template(text: str) -> dict[str, str]:
    return {"__prefect_kind": "jinja", "template": text}


def register_automations(settings: Settings, owner: str) -> list[str]:
    """Create the automations, or bring those of the same names up to date; returns their names.

    One that was switched off or on stays so. Notices that are not wanted any more are removed if this `owner` set them
    up; those of another machine or home directory stay. Raises `BadInput` for a block that no notice can be sent by.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        deploy_id = client.read_deployment_by_name("deploy/deploy").id
        limit_s = settings.worker.lost_after_s
        wanted = [*automations(deploy_id, lost_after_s=limit_s), *notices(settings.notices, owner, client)]
        for name in {*NOTICES} - {automation.name for automation in wanted}:
            found = client.read_automations_by_name(name)
            _delete(client, [unwanted.id for unwanted in found if is_owned_by(unwanted.description, owner)])
        keep_automations(client, wanted)
    return [automation.name for automation in wanted]


def keep_automations(client: "SyncPrefectClient", wanted: Sequence["Automation"]) -> None:
    """Create automations, or bring those of the same names up to date."""
    for automation in wanted:
        known = next(iter(client.read_automations_by_name(automation.name)), None)
        if known:
            automation.id, automation.enabled = known.id, known.enabled
            automation.update()
        else:
            automation.create()
        # Where the answer to its creation was lost, Prefect's client has made it twice.
        found = client.read_automations_by_name(automation.name)
        _delete(client, [twin.id for twin in found if twin.id != automation.id])


def _delete(client: "SyncPrefectClient", unwanted: Sequence[UUID]) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    for automation_id in unwanted:
        try:
            client.delete_automation(automation_id)
        except PrefectHTTPStatusError as error:  # another machine was first, or the first answer was lost
            if error.response.status_code != 404:
                raise
