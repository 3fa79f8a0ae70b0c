"""The automations of `slmops up`: they deploy on an event, send notices, and find lost runs."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from slmops.events import CHECKPOINT_READY
from slmops.infra.server_settings import PREFECT_TAG
from slmops.infra.settings import Settings

if TYPE_CHECKING:
    from prefect.automations import Automation, EventTrigger, Posture
    from prefect.client.orchestration import SyncPrefectClient

OF_OURS = {"prefect.resource.id": f"prefect.tag.{PREFECT_TAG}", "prefect.resource.role": "tag"}
NOTICES_BLOCK = "slmops-notices"

NOT_IN_EVENT = "(the event names no checkpoint or no model)"
DEPLOY_ON_EVENT = "slmops: deploy a checkpoint that is ready"
LOST_RUNS = "slmops: a run without a sign of life has crashed"
LATE_SIGNS = "slmops: a late sign of life withdraws that a run has crashed"
FAILURE_NOTICE = "slmops: notice of a failed run"
REGRESSION_NOTICE = "slmops: notice of a regression"
APPROVAL_NOTICE = "slmops: notice of a run that waits for approval"
NOTICES = (FAILURE_NOTICE, REGRESSION_NOTICE, APPROVAL_NOTICE)

# A process that hung for longer than this has lost its work in any case.
LATE_UNTIL = timedelta(days=1)

# The shortest interval that Prefect accepts. It is in workers' environments, and their runs inherit it.
HEARTBEAT_VARIABLE = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
HEARTBEAT_S = 30

HEARTBEAT = "prefect.flow-run.heartbeat"
RUNS = "prefect.flow-run.*"
FAILED = ("Failed", "Crashed", "Rejected", "TimedOut")
CRASHED = "prefect.flow-run.Crashed"
ENDED = (*FAILED, "Completed", "Cancelled", "Paused", "Suspended")


def automations(
    deploy_id: UUID, webhook_block_id: Any | None, *, lost_after_s: float, owner: str
) -> list["Automation"]:
    """Return the automations, ready to be created. Those that post notices are included only if there is a webhook.

    `owner` names the machine and home directory whose setting is the webhook.
    """
    from prefect.automations import Automation, CallWebhook, ChangeFlowRunState, Posture, RunDeployment
    from prefect.client.schemas.objects import StateType

    found = [
        Automation(
            name=DEPLOY_ON_EVENT,
            description="A training run emits slmops.checkpoint.ready, and its checkpoint is deployed.",
            trigger=_at_once({CHECKPOINT_READY}, "slmops.model.*"),
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
                Posture.Proactive, HEARTBEAT, {HEARTBEAT, *_run_events(ENDED)}, timedelta(seconds=lost_after_s)
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
    if webhook_block_id is None:
        return found
    from slmops.tasks.runs.events import REGRESSION

    of_run = _notice("event.event", "flow_run.name", "flow_run.state.message")
    regression = _notice("event.event", "event.payload.reference", "event.payload.summary")
    return [
        *found,
        Automation(
            name=FAILURE_NOTICE,
            description=_owned_by(owner),
            trigger=_at_once(_run_events(FAILED), RUNS, related=OF_OURS),
            actions=[CallWebhook(block_document_id=webhook_block_id, payload=of_run)],
        ),
        Automation(
            name=APPROVAL_NOTICE,
            description=_owned_by(owner),
            trigger=_at_once(_run_events(("Paused",)), RUNS, related=OF_OURS),
            actions=[CallWebhook(block_document_id=webhook_block_id, payload=of_run)],
        ),
        Automation(
            name=REGRESSION_NOTICE,
            description=_owned_by(owner),
            trigger=_at_once({REGRESSION}, "slmops.model.*"),
            actions=[CallWebhook(block_document_id=webhook_block_id, payload=regression)],
        ),
    ]


def _owned_by(owner: str) -> str:
    return f"Posts to the webhook of SLMOPS_NOTICES__WEBHOOK_URL of {owner}."


def _run_events(states: Sequence[str]) -> set[str]:
    return {f"prefect.flow-run.{state}" for state in states}


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


def _at_once(events: set[str], resource: str, related: dict[str, str] | None = None) -> "EventTrigger":
    """A trigger on each event of a resource, by its id, and of `related` resources."""
    from prefect.automations import EventTrigger, Posture

    return EventTrigger(
        expect=events,
        match={"prefect.resource.id": resource},
        match_related=related or {},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


def _notice(event: str, subject: str, message: str) -> str:
    fields = {"event": event, "subject": subject, "message": message}
    return "{" + ", ".join(f'"{name}": {{{{ {source} | tojson }}}}' for name, source in fields.items()) + "}"


def _template(text: str) -> dict[str, str]:
    return {"__prefect_kind": "jinja", "template": text}


def register_automations(settings: Settings, owner: str) -> list[str]:
    """Create the automations, or bring those of the same names up to date; returns their names.

    One that was switched off stays off. Without a webhook in the settings the notices' automations of this `owner` are
    removed; those that another machine or home directory has set up stay.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        deploy_id = client.read_deployment_by_name("deploy/deploy").id
        limit_s = settings.worker.lost_after_s
        wanted = automations(deploy_id, _webhook_block(settings), lost_after_s=limit_s, owner=owner)
        for name in {*NOTICES} - {automation.name for automation in wanted}:
            found = client.read_automations_by_name(name)
            _delete(client, [unwanted.id for unwanted in found if unwanted.description == _owned_by(owner)])
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
    return [automation.name for automation in wanted]


def _delete(client: "SyncPrefectClient", unwanted: Sequence[UUID]) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    for automation_id in unwanted:
        try:
            client.delete_automation(automation_id)
        except PrefectHTTPStatusError as error:  # another machine was first, or the first answer was lost
            if error.response.status_code != 404:
                raise


def _webhook_block(settings: Settings) -> Any | None:
    from prefect.blocks.webhook import Webhook

    url = settings.notices.webhook_url
    if url is None:
        return None
    return Webhook(url=url, headers={"Content-Type": "application/json"}).save(NOTICES_BLOCK, overwrite=True)
