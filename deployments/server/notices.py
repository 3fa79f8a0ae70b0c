"""The automations that send notices: to a webhook as JSON, and by a notification block of Prefect as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from slmops.infra.errors import BadInput
from slmops.infra.server_settings import PREFECT_TAG, NoticeSettings

if TYPE_CHECKING:
    from prefect.automations import Automation, EventTrigger
    from prefect.client.orchestration import SyncPrefectClient

OF_OURS = {"prefect.resource.id": f"prefect.tag.{PREFECT_TAG}", "prefect.resource.role": "tag"}
NOTICES_BLOCK = "slmops-notices"
RUNS = "prefect.flow-run.*"
MODELS = "slmops.model.*"
RUN_FAILURES = ("Failed", "Crashed", "Rejected", "TimedOut")

FAILURE_NOTICE = "slmops: notice of a failed run"
REGRESSION_NOTICE = "slmops: notice of a regression"
APPROVAL_NOTICE = "slmops: notice of a run that waits for approval"
CHAMPION_NOTICE = "slmops: notice of another champion"
VERDICT_NOTICE = "slmops: notice of a registered or rejected version"
NOTICES = (FAILURE_NOTICE, REGRESSION_NOTICE, APPROVAL_NOTICE, CHAMPION_NOTICE, VERDICT_NOTICE)

# Prefect's templates over the event; the link leads to the run's page in the UI.
LINK = "{% if flow_run %}{{ flow_run|ui_url }}{% endif %}"


@dataclass(frozen=True)
class _Notice:
    """What a notice says: templates' expressions of its subject and of its message, and whether it is sent at once."""

    name: str
    trigger: "EventTrigger"
    subject: str
    message: str
    is_on: bool = True


def notices(settings: NoticeSettings, owner: str, client: "SyncPrefectClient") -> list["Automation"]:
    """Return the automations of notices, ready to be created; none without a webhook and a block in the settings.

    `owner` names the machine and home directory of the settings. Raises `BadInput` for a block that is not there, or
    that sends no notices.
    """
    from prefect.automations import Automation, CallWebhook, SendNotification

    webhook, block = _webhook_block(settings), _notification_block(settings.block, client)
    found = []
    for notice in _all_notices():
        actions: list[CallWebhook | SendNotification] = []
        if webhook:
            actions.append(CallWebhook(block_document_id=webhook, payload=_as_json(notice)))
        if block:
            body = f"{{{{ {notice.message} }}}}\n{LINK}"
            subject = f"{{{{ {notice.subject} }}}}: {{{{ event.event }}}}"
            actions.append(SendNotification(block_document_id=block, subject=subject, body=body))
        if actions:
            automation = Automation(
                name=notice.name,
                description=owned_by(owner),
                enabled=notice.is_on,
                trigger=notice.trigger,
                actions=actions,
            )
            found.append(automation)
    return found


def owned_by(owner: str) -> str:
    """Return the description of the notices that an owner's settings set up."""
    return f"Sends to the webhook or block that SLMOPS_NOTICES__... names, of {owner}."


def is_owned_by(description: str, owner: str) -> bool:
    """Whether a notice has the description of an owner's, also that of an earlier version of slmops."""
    return description.endswith(f" of {owner}.")


def run_events(states: Sequence[str]) -> set[str]:
    """Return the events of runs that enter these states."""
    return {f"prefect.flow-run.{state}" for state in states}


def at_once(events: set[str], resource: str, related: dict[str, str] | None = None) -> "EventTrigger":
    """Return a trigger on each event of a resource, by its id, and of `related` resources."""
    from prefect.automations import EventTrigger, Posture

    return EventTrigger(
        expect=events,
        match={"prefect.resource.id": resource},
        match_related=related or {},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


def _all_notices() -> list[_Notice]:
    from slmops.tasks.runs import events

    of_run = ("flow_run.name", "flow_run.state.message")
    of_model = ("event.payload.reference", "event.payload.summary")
    champion = {events.CHAMPION_PROMOTED, events.CHAMPION_ROLLED_BACK}
    verdict = {events.VERSION_REGISTERED, events.VERSION_REJECTED}
    return [
        _Notice(FAILURE_NOTICE, at_once(run_events(RUN_FAILURES), RUNS, OF_OURS), *of_run),
        _Notice(APPROVAL_NOTICE, at_once(run_events(("Paused",)), RUNS, OF_OURS), *of_run),
        _Notice(REGRESSION_NOTICE, at_once({events.REGRESSION}, MODELS), *of_model),
        # Each deploy would send one: whoever wants them switches them on.
        _Notice(CHAMPION_NOTICE, at_once(champion, MODELS), *of_model, is_on=False),
        _Notice(VERDICT_NOTICE, at_once(verdict, MODELS), *of_model, is_on=False),
    ]


def _as_json(notice: _Notice) -> str:
    fields = {"event": "event.event", "subject": notice.subject, "message": notice.message}
    return "{" + ", ".join(f'"{name}": {{{{ {source} | tojson }}}}' for name, source in fields.items()) + "}"


def _webhook_block(settings: NoticeSettings) -> Any | None:
    from prefect.blocks.webhook import Webhook

    url = settings.webhook_url
    if url is None:
        return None
    return Webhook(url=url, headers={"Content-Type": "application/json"}).save(NOTICES_BLOCK, overwrite=True)


def _notification_block(named: str | None, client: "SyncPrefectClient") -> UUID | None:
    """Return the id of a notification block, which is named by its type and name, such as `slack-webhook/team`."""
    from prefect.exceptions import ObjectNotFound

    if named is None:
        return None
    kind, _, name = named.partition("/")
    try:
        found = client.read_block_document_by_name(name, kind)
    except ObjectNotFound:
        raise BadInput(
            f"Prefect's server has no block {named!r} (SLMOPS_NOTICES__BLOCK).",
            "Make a notification block in the UI, under Blocks, and give its type and name: slack-webhook/team.",
            code="notice-block-missing",
        ) from None
    if found.block_schema is None or "notify" not in found.block_schema.capabilities:
        raise BadInput(
            f"The block {named!r} (SLMOPS_NOTICES__BLOCK) sends no notifications.",
            "Name one of a type such as slack-webhook, ms-teams-webhook, pager-duty-webhook or sendgrid-email.",
            code="notice-block-kind",
        )
    return found.id
