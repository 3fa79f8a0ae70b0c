"""The checks of `slmops up --check`: server, work pool, workers, deployments, schedules, automations."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import httpx

from slmops.deployments.server.access import authorization
from slmops.deployments.server.automations import DEPLOY_ON_EVENT, LATE_SIGNS, LOST_RUNS
from slmops.deployments.server.registration import full_name
from slmops.deployments.server.schedules import Planned, planned_of
from slmops.infra.foreign_text import without_passwords
from slmops.infra.records import Record

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

TIMEOUT_S = 10.0


class Check(Record):
    """One requirement: its name, what was found, and what to do if it is missing."""

    what: str
    ok: bool
    found: str
    what_to_do: str = ""


class Running(Record):
    """All checks; `ok` if nothing is missing."""

    ok: bool
    api_url: str | None
    checks: tuple[Check, ...]

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of a table for people."""
        return [
            {
                "what": check.what,
                "verdict": "ok" if check.ok else "missing",
                "found": check.found,
                "what to do": check.what_to_do,
            }
            for check in self.checks
        ]


def server_fault(url: str) -> str | None:
    """Return why the API at a URL is not healthy, or None if it is."""
    password = os.environ.get("PREFECT_API_AUTH_STRING")
    try:
        with httpx.Client(timeout=TIMEOUT_S) as client:
            answer = client.get(f"{url}/health")
            # This call needs no password.
            called = client.get(f"{url}/version", headers=authorization(password) if password else None)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    if called.status_code == httpx.codes.UNAUTHORIZED and not os.environ.get("PREFECT_API_KEY"):
        return "PREFECT_API_AUTH_STRING is not its user and password"
    return None if answer.status_code == 200 else f"it answers with status {answer.status_code}"


def is_open(url: str) -> bool:
    """Whether the API at a URL takes calls without a password."""
    try:
        return httpx.get(f"{url}/version", timeout=TIMEOUT_S).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def check_running(url: str | None, pool: str, entries: Sequence[Mapping[str, object]]) -> Running:
    """Check, without changes, that the server `url` of Prefect's settings has everything that `slmops up` starts."""
    from prefect.client.orchestration import get_client

    shown = without_passwords(url) if url else None
    if not url or (fault := server_fault(url)):
        found = fault if url else "none: no PREFECT_API_URL, and no slmops up runs with this home directory"
        advice = "Start it: slmops up" if not url else "Start it, or correct PREFECT_API_URL."
        return Running(
            ok=False, api_url=shown, checks=(Check(what="server", ok=False, found=found, what_to_do=advice),)
        )
    with get_client(sync_client=True) as client:
        checks = [Check(what="server", ok=True, found=f"Prefect {client.api_version()} at {shown}")]
        checks += [
            *_check_pool(client, pool),
            *(check for entry in entries for check in _check_deployment(client, entry)),
            *(_check_automation(client, name) for name in (DEPLOY_ON_EVENT, LOST_RUNS, LATE_SIGNS)),
        ]
    return Running(ok=all(check.ok for check in checks), api_url=shown, checks=tuple(checks))


def _check_pool(client: "SyncPrefectClient", pool: str) -> list[Check]:
    from prefect.exceptions import ObjectNotFound

    try:
        found = client.read_work_pool(pool)
    except ObjectNotFound:
        return [Check(what=f"work pool {pool}", ok=False, found="none", what_to_do=f"slmops up --pool {pool}")]
    online = [worker.name for worker in client.read_workers_for_work_pool(pool) if worker.status == "ONLINE"]
    return [
        Check(
            what=f"work pool {pool}",
            ok=not found.is_paused,
            found="paused" if found.is_paused else "open",
            what_to_do="Resume it in the UI." if found.is_paused else "",
        ),
        Check(
            what="workers",
            ok=bool(online),
            found=", ".join(online) or "none online",
            what_to_do="" if online else f"slmops up --pool {pool}",
        ),
    ]


def _check_deployment(client: "SyncPrefectClient", entry: Mapping[str, object]) -> list[Check]:
    from prefect.exceptions import ObjectNotFound

    name = full_name(entry)
    try:
        found = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return [Check(what=f"deployment {name}", ok=False, found="none", what_to_do="slmops up registers it.")]
    checks = [Check(what=f"deployment {name}", ok=True, found=f"version {found.version}")]
    required = (found.parameter_openapi_schema or {}).get("required", ())
    checks += [_check_schedule(name, planned, required) for planned in planned_of(found)]
    return checks


def _check_schedule(name: str, planned: Planned, required: Sequence[str]) -> Check:
    what = f"schedule of {name}"
    if not planned.active:
        return Check(what=what, ok=True, found=f"{planned.rule}, switched off")
    if missing := [parameter for parameter in required if parameter not in planned.parameters]:
        advice = "Set them in the UI, or by slmops schedule; its runs fail without them."
        return Check(what=what, ok=False, found=f"{planned.rule}, without {', '.join(missing)}", what_to_do=advice)
    return Check(
        what=what,
        ok=planned.next_at is not None,
        found=f"{planned.rule}, next run {planned.next_at or 'never'}",
        what_to_do="" if planned.next_at else "It has no time in the future: change it.",
    )


def _check_automation(client: "SyncPrefectClient", name: str) -> Check:
    found = client.read_automations_by_name(name)
    return Check(
        what=f"automation {name!r}",
        ok=bool(found),
        found="none" if not found else "switched on" if found[0].enabled else "switched off",
        what_to_do="" if found else "slmops up sets it up.",
    )
