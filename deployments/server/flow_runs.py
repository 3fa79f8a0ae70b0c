"""The flow runs on Prefect's API, read without importing Prefect, which takes longer than the answer."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx

from slmops.deployments.server.access import authorization, make_private
from slmops.deployments.server.embedded import EmbeddedServer
from slmops.deployments.server.environment import prefect_home, unusable_api
from slmops.infra.errors import BadInput
from slmops.infra.records import Record
from slmops.infra.settings import Settings

TIMEOUT_S = 10.0
# While its SQLite database is locked, which may take a minute, the API answers 503.
BUSY_S = 60.0
BUSY_POLL_S = 0.5
# The API had the request: a repeated one is answered, unlike one to a server that is not there.
LOST = (httpx.ReadTimeout, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
FLOWS = ("deploy", "regate", "retrain", "benchmark", "promote", "rollback", "gc")
UNDER_WAY = ("RUNNING", "PENDING", "PAUSED", "CANCELLING")


class Run(Record):
    """A flow run: its model, its state in words, its times in ISO 8601, and its address where there is a UI."""

    id: str
    name: str
    flow: str
    model: str | None
    state: str
    started_at: str | None
    took_s: float | None
    address: str | None


class DueRun(Record):
    """The next run by a schedule: its deployment, and the model that its parameters name."""

    deployment: str
    model: str | None
    due_at: str


@dataclass(frozen=True)
class RunReader:
    """Reads the runs of slmops's flows; every method raises `StageFailed` where the API does not answer.

    `has_ui` says whether a browser can open a run's page; not so for an embedded server, which ends with its command.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    has_ui: bool = True

    @property
    def ui(self) -> str | None:
        """The address of Prefect's UI, where there is one."""
        return os.environ.get("PREFECT_UI_URL", self.url.removesuffix("/api")) if self.has_ui else None

    def address_of(self, run_id: str) -> str | None:
        """Return the address of a run's page, where there is a UI."""
        return f"{self.ui}/runs/flow-run/{run_id}" if self.ui else None

    def recent(self, limit: int) -> list[Run]:
        """Return the last runs, the newest first."""
        return self._runs({"sort": "START_TIME_DESC", "limit": limit}, ("SCHEDULED",), excluded=True)

    def under_way(self) -> list[Run]:
        """Return the runs that have begun and not ended, the newest first."""
        return self._runs({"sort": "START_TIME_DESC", "limit": 50}, UNDER_WAY)

    def due(self) -> list[DueRun]:
        """Return the next scheduled run of each deployment and model, the nearest first.

        Prefect's scheduler plans a new schedule's runs within a minute.
        """
        runs = self.ask("flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC", "limit": 200, **_of(("SCHEDULED",))})
        first: dict[tuple[str, str | None], str] = {}
        for run in runs:
            if run.get("deployment_id") and run.get("expected_start_time"):
                first.setdefault((run["deployment_id"], _model_of(run)), run["expected_start_time"])
        named = {"deployments": {"id": {"any_": [deployment for deployment, _ in first]}}}
        deployments = self.ask("deployments/filter", named) if first else []
        names = {deployment["id"]: deployment["name"] for deployment in deployments}
        return [
            DueRun(deployment=names[deployment], model=model, due_at=at)
            for (deployment, model), at in first.items()
            if deployment in names
        ]

    def _post(self, path: str, query: Mapping[str, object], deadline: float) -> httpx.Response | None:
        """Return the answer, or None before the deadline where it is to be asked for again."""
        is_last = time.monotonic() > deadline
        try:
            answer = httpx.post(f"{self.url}/{path}", json=dict(query), headers=dict(self.headers), timeout=TIMEOUT_S)
        except LOST:
            if is_last:
                raise
            return None
        return answer if is_last or answer.status_code != httpx.codes.SERVICE_UNAVAILABLE else None

    def find(self, named: str | None) -> Run:
        """Return the run of an id, a run's name or a model's name, by default of any: one under way, else the last.

        Raises `BadInput` when there is none.
        """
        for run in [*self.under_way(), *self.recent(200)]:
            if not named or named in (run.id, run.name, run.model):
                return run
        raise BadInput(f"There is no run {named}." if named else "There are no runs yet.", "slmops runs lists them.")

    def _runs(self, query: Mapping[str, object], states: Sequence[str], *, excluded: bool = False) -> list[Run]:
        flows = self.ask("flows/filter", {"flows": {"name": {"any_": list(FLOWS)}}})
        names = {flow["id"]: flow["name"] for flow in flows}
        runs = self.ask("flow_runs/filter", {**query, **_of(states, excluded=excluded)})
        return [self._run(run, names.get(run["flow_id"], "")) for run in runs]

    def _run(self, run: Mapping[str, Any], flow: str) -> Run:
        return Run(
            id=run["id"],
            name=run["name"],
            flow=flow,
            model=_model_of(run),
            state=run.get("state_name") or run.get("state_type") or "unknown",
            started_at=run.get("start_time"),
            took_s=_took_s(run),
            address=self.address_of(run["id"]),
        )

    def ask(self, path: str, query: Mapping[str, object]) -> Any:
        """Post a query, and return the answer; raises `BadInput` for parameters that a deployment does not take.

        It is posted again while the API's database is busy, and where its answer was lost.
        """
        deadline = time.monotonic() + BUSY_S
        try:
            while (answer := self._post(path, query, deadline)) is None:
                time.sleep(BUSY_POLL_S)
            if answer.status_code == httpx.codes.CONFLICT:
                reason = str(answer.json()["detail"]).removeprefix("Error creating flow run: ")
                raise BadInput(f"Prefect's API refused the run: {reason}.", "Correct it.", code="parameter-refused")
            return answer.raise_for_status().json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
            raise unusable_api(self.url, str(error) or type(error).__name__) from None


def _of(states: Sequence[str], *, excluded: bool = False) -> dict[str, object]:
    wanted = {"not_any_" if excluded else "any_": list(states)}
    return {
        "flows": {"name": {"any_": list(FLOWS)}},
        "flow_runs": {"state": {"type": wanted}, "parent_task_run_id": {"is_null_": True}},
    }


def _model_of(run: Mapping[str, Any]) -> str | None:
    """Return the model that a run's parameters name, if any."""
    given = run.get("parameters") or {}
    return str(given.get("name") or str(given.get("reference") or "").partition("@")[0]) or None


def _took_s(run: Mapping[str, Any]) -> float | None:
    if not run.get("start_time"):
        return None
    began = datetime.fromisoformat(run["start_time"])
    ended = datetime.fromisoformat(run["end_time"]) if run.get("end_time") else datetime.now(UTC)
    return max(0.0, (ended - began).total_seconds())


def configured_reader() -> RunReader | None:
    """Return a reader of the API that the environment names (see `prepare_prefect`), or None without one."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return None
    password, key = os.environ.get("PREFECT_API_AUTH_STRING"), os.environ.get("PREFECT_API_KEY")
    headers = authorization(password) if password else {"Authorization": f"Bearer {key}"} if key else {}
    return RunReader(url, headers)


@contextmanager
def run_reader(settings: Settings) -> Iterator[RunReader | None]:
    """Provide a reader of the configured API, else of an embedded one on this home's runs; None before the first run.

    The embedded server takes some seconds to start.
    """
    if configured := configured_reader():
        yield configured
        return
    if not (prefect_home(settings) / "prefect.db").is_file():
        yield None
        return
    server = EmbeddedServer()
    try:
        make_private(prefect_home(settings))
        url = server.serve(settings.cache_dir / "logs" / "prefect-server.log", settings.user_cache_dir)
        yield RunReader(url, authorization(server.password), has_ui=False)
    finally:
        server.end()
