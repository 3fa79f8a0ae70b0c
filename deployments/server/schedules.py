"""The schedules of a server's deployments: setting one for a model, and when each is due, by its own rule."""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from slmops.deployments.server.registration import schedule_of
from slmops.infra.errors import BadInput
from slmops.infra.records import Record

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse


class Planned(Record):
    """A schedule of a deployment: its rule, its parameters, and its next time in ISO 8601, None if it has none."""

    deployment: str
    slug: str | None
    rule: str
    active: bool
    parameters: dict[str, Any]
    next_at: str | None


def set_schedule(deployment: str, slug: str, cron: str, timezone: str, parameters: Mapping[str, object]) -> Planned:
    """Run a deployment by a cron with parameters, in place of its schedule of the same slug; returns the schedule.

    Raises `BadInput` for a cron or time zone that is not valid or has no future time, and a missing deployment.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.exceptions import PrefectHTTPStatusError

    schedule_of({"cron": cron, "timezone": timezone}, deployment)  # refuses what is not valid
    rule = CronSchedule(cron=cron, timezone=timezone)
    if next_time(rule) is None:
        raise BadInput(
            f"The schedule {cron!r} has no time in the future.",
            "Write five fields, such as 0 2 * * *.",
            code="schedule-never-due",
        )
    wanted = DeploymentScheduleCreate(schedule=rule, active=True, parameters=dict(parameters), slug=slug)
    with get_client(sync_client=True) as client:
        found = _deployment(client, deployment)
        _remove(client, found, slug)
        try:
            client.create_deployment_schedules(found.id, [wanted])
        except PrefectHTTPStatusError:  # so a server answers that has it already, where its first answer was lost
            if not (made := _planned(client, deployment, slug)):
                raise
            return made[0]
        return _planned(client, deployment, slug)[0]


def remove_schedules(slugs: Mapping[str, str]) -> list[str]:
    """Remove the schedules of these slugs, by deployment, and return the deployments that had one."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return [name for name, slug in slugs.items() if _remove(client, _deployment(client, name), slug)]


def planned_of(deployment: "DeploymentResponse") -> Iterator[Planned]:
    """Yield the schedules of a deployment."""
    for schedule in deployment.schedules:
        active = schedule.active and not deployment.paused
        yield Planned(
            deployment=deployment.name,
            slug=schedule.slug,
            rule=_shown(schedule.schedule),
            active=active,
            parameters={**deployment.parameters, **schedule.parameters},
            next_at=next_time(schedule.schedule) if active else None,
        )


def next_time(schedule: Any) -> str | None:
    """Return the next time of a schedule in ISO 8601, by the rules of Prefect's own scheduler; None if there is none.

    The server plans runs some time after it has learned of a schedule, so its runs do not say this.
    """
    from prefect.server.schemas import schedules

    same = getattr(schedules, type(schedule).__name__).model_validate(schedule.model_dump())
    try:
        dates = asyncio.run(same.get_dates(1, start=datetime.now(UTC)))
    except ValueError:  # the 30th of February
        return None
    return str(dates[0].isoformat(timespec="seconds")) if dates else None


def _shown(schedule: Any) -> str:
    rule = getattr(schedule, "cron", None) or getattr(schedule, "rrule", None) or f"every {schedule.interval}"
    return f"{rule} ({schedule.timezone or 'UTC'})"


def _deployment(client: "SyncPrefectClient", name: str) -> "DeploymentResponse":
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(f"{name}/{name}")
    except ObjectNotFound:
        raise BadInput(
            f"The server has no deployment {name!r}.", "slmops up registers it.", code="deployment-missing"
        ) from None


def _planned(client: "SyncPrefectClient", deployment: str, slug: str) -> list[Planned]:
    return [planned for planned in planned_of(_deployment(client, deployment)) if planned.slug == slug]


def _remove(client: "SyncPrefectClient", deployment: "DeploymentResponse", slug: str) -> bool:
    from prefect.exceptions import ObjectNotFound

    found = [schedule for schedule in deployment.schedules if schedule.slug == slug]
    for schedule in found:
        with contextlib.suppress(ObjectNotFound):  # it was removed, and the server's first answer was lost
            client.delete_deployment_schedule(deployment.id, schedule.id)
    return bool(found)
