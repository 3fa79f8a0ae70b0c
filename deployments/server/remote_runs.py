"""A run on the workers of a Prefect server: started over its API, and followed until it ends."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slmops.client import ENDED
from slmops.deployments.server.flow_runs import RunReader
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.records import Record
from slmops.infra.storage.inputs import ingest
from slmops.infra.storage.registry import ModelRegistry

POLL_S = 1.0
# A server that restarts does not answer for a time, and its runs go on.
SILENCE_S = 300.0
LAST_LINES_S = 3.0  # a run's process sends the last lines of its log at its exit
# Lines of several processes arrive out of order: a line may be this much older than one that is there already.
LATE = timedelta(seconds=15)
PAGE = 200  # the most records that the API returns at once
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Fetched = Callable[[str, float, str], None]


class LogLine(Record):
    """A line of a run's log; `level` is Python's number of it."""

    at: str
    level: int
    text: str


class TaskSeen(Record):
    """A stage of a run: whether it is `RUNNING`, `COMPLETED` or `FAILED`, and its share from 0 to 1."""

    name: str
    state: str
    share: float


class RunState(Record):
    """The state of a run: its type and name in Prefect's words, and its message."""

    type: str
    name: str
    message: str

    @property
    def has_ended(self) -> bool:
        """Whether it is the run's last state."""
        return self.type in ENDED


def start_run(reader: RunReader, flow: str, parameters: Mapping[str, object], say: Callable[[str], None]) -> str:
    """Start a run of a flow's deployment on the server, and return the run's id; says if no worker is there yet.

    Raises `BadInput` for a server without the deployment, and for wrong parameters.
    """
    deployments = reader.ask("deployments/filter", {"deployments": {"name": {"any_": [flow]}}})
    if not deployments:
        raise BadInput(f"The server has no deployment {flow!r}.", "slmops up registers it.", code="deployment-missing")
    # A repeated call starts no second run.
    asked = {"parameters": dict(parameters), "idempotency_key": str(uuid.uuid4())}
    run = reader.ask(f"deployments/{deployments[0]['id']}/create_flow_run", asked)
    pool = deployments[0]["work_pool_name"]
    workers = reader.ask(f"work_pools/{pool}/workers/filter", {})
    if all(worker["status"] != "ONLINE" for worker in workers):
        say(f"No worker of the work pool {pool!r} is online yet; slmops up --pool {pool} starts one.")
    return str(run["id"])


def readable_elsewhere(
    parameters: Mapping[str, Any], files: tuple[str, ...], reader: RunReader, registry: ModelRegistry, show: Fetched
) -> dict[str, Any]:
    """Return parameters whose `files` a worker can read, wherever the current folder is.

    On this machine's own server they are whole paths. For another server they are put into the store.
    """
    local = urlsplit(reader.url).hostname in LOOPBACK
    changed = dict(parameters)
    for name in files:
        path = Path(str(parameters.get(name) or "")).expanduser()
        if not parameters.get(name) or not path.exists():
            continue
        if local:
            changed[name] = str(path.absolute())
            continue
        found = ingest(registry, path, lambda done, total, what: show("ingest", done / total, what))
        show("ingest", 1.0, "")
        changed[name] = found.address
    return changed


class Look(Record):
    """A look at a run: its state, its stages, and the lines of its log that are new since the last look."""

    state: RunState
    tasks: tuple[TaskSeen, ...]
    lines: tuple[LogLine, ...]


@dataclass
class FollowedRun:
    """A run that is followed until it ends."""

    reader: RunReader
    run_id: str
    _seen: set[str] = field(default_factory=set)
    _newest: str | None = None

    def looks(self, *, tasks: bool = False, lines: bool = False) -> Iterator[Look]:
        """Look at the run every second until it has ended; the last look has its last state.

        Raises `BadInput` if the run was deleted, and `StageFailed` if the API does not answer for five minutes.
        """
        answered = time.monotonic()
        while True:
            try:
                look = self._look(tasks=tasks, lines=lines)
            except StageFailed:
                if time.monotonic() - answered > SILENCE_S:
                    raise
            else:
                answered = time.monotonic()
                yield look
                if look.state.has_ended:
                    break
            time.sleep(POLL_S)
        if lines:
            time.sleep(LAST_LINES_S)
            yield self._look(tasks=tasks, lines=lines)

    def _look(self, *, tasks: bool, lines: bool) -> Look:
        state = self.state()
        found = self.tasks() if tasks else ()
        return Look(state=state, tasks=tuple(found), lines=tuple(self.new_lines() if lines else ()))

    def state(self) -> RunState:
        """Return the run's state."""
        found = self.reader.ask("flow_runs/filter", {"flow_runs": {"id": {"any_": [self.run_id]}}})
        if not found:
            raise BadInput(f"The server has no run {self.run_id}.", "slmops runs lists them.", code="run-missing")
        state = found[0]["state"] or {}
        return RunState(
            type=state.get("type", "PENDING"), name=state.get("name", "Pending"), message=state.get("message") or ""
        )

    def tasks(self) -> list[TaskSeen]:
        """Return the run's stages in the order in which they began."""
        of_run = {"flow_runs": {"id": {"any_": [self.run_id]}}, "limit": PAGE}
        found = self.reader.ask("task_runs/filter", {**of_run, "sort": "EXPECTED_START_TIME_DESC"})
        posted = {"flow_run_id": {"any_": [self.run_id]}, "type": {"any_": ["progress"]}}
        shares = {
            str(artifact["description"]).replace(" ", "-"): float(artifact["data"]) / 100
            for artifact in self.reader.ask("artifacts/filter", {"artifacts": posted, "limit": PAGE})
        }
        return [
            TaskSeen(name=task["name"], state=task["state_type"] or "PENDING", share=shares.get(task["name"], 0.0))
            for task in reversed(found)
        ]

    def new_lines(self) -> list[LogLine]:
        """Return the lines of the run's log that came since the last call."""
        logs: dict[str, Any] = {"flow_run_id": {"any_": [self.run_id]}}
        if self._newest:
            logs["timestamp"] = {"after_": (datetime.fromisoformat(self._newest) - LATE).isoformat()}
        lines: list[LogLine] = []
        offset = 0
        while True:
            query = {"logs": logs, "sort": "TIMESTAMP_ASC", "limit": PAGE, "offset": offset}
            page = self.reader.ask("logs/filter", query)
            for line in page:
                if line["id"] not in self._seen:
                    self._seen.add(line["id"])
                    lines.append(LogLine(at=line["timestamp"], level=line["level"], text=line["message"]))
                    self._newest = max(self._newest or "", line["timestamp"])
            if len(page) < PAGE:
                return lines
            offset += PAGE

    def document(self) -> dict[str, Any] | None:
        """Return the run's result as a JSON document, which a deploy posts as an artifact; None without one."""
        posted = {"flow_run_id": {"any_": [self.run_id]}, "type": {"any_": ["json"]}}
        found = self.reader.ask("artifacts/filter", {"artifacts": posted, "sort": "CREATED_DESC"})
        documents = [artifact["data"] for artifact in found if str(artifact["key"]).endswith("-document")]
        return dict(json.loads(documents[0])) if documents else None
