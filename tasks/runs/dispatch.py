"""Flow runs on the workers of a pool: they are started, followed, restarted if they are lost, and cancelled."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID, uuid4

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Crashed

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.call import OnProgress
from slmops.infra.settings import Settings

ATTEMPTS = 3
POLL_INTERVAL_S = 1.0
WITHOUT_API_S = 600.0
TELL_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Job:
    """One requested flow run: its name and its parameters."""

    name: str
    parameters: Mapping[str, object]


@dataclass(frozen=True)
class Outcome:
    """The end of a job: the id of its run, and the error if it failed."""

    run_id: str
    error: str | None = None


@dataclass
class _Attempts:
    """The runs of a job that may still end it, oldest first: a lost one is kept, since it may be only late."""

    run_ids: list[UUID] = field(default_factory=list)
    started: int = 0
    key: str = field(default_factory=lambda: uuid4().hex)


def check_pool(pool: str, flow_names: Sequence[str]) -> None:
    """Raise `BadInput` for a work pool that is missing or paused, or that has no online worker or lacks these flows."""
    start = f"Start one on a machine of its own: slmops up --pool {pool}"
    with get_client(sync_client=True) as client:
        try:
            found = client.read_work_pool(pool)
        except ObjectNotFound:
            raise BadInput(f"There is no work pool {pool!r}.", start, code="work-pool-missing") from None
        if found.is_paused:
            raise BadInput(f"The work pool {pool!r} is paused.", "Resume it in Prefect's UI.")
        for flow_name in flow_names:
            try:
                client.read_deployment_by_name(f"{flow_name}/{pool}")
            except ObjectNotFound:
                raise BadInput(f"The work pool {pool!r} has no deployment of {flow_name!r}.", start) from None
        if not _online(client, pool):
            raise BadInput(f"The work pool {pool!r} has no worker online.", start)


def _online(client: SyncPrefectClient, pool: str) -> list[str]:
    return [worker.name for worker in client.read_workers_for_work_pool(pool) if worker.status == "ONLINE"]


def run_on_pool(
    flow_name: str,
    pool: str,
    jobs: Mapping[str, Job],
    settings: Settings,
    on_progress: OnProgress = lambda done, total, what: None,
) -> dict[str, Outcome]:
    """Run a job per key on a pool's workers, all in parallel, and wait for their ends; progress counts ended jobs.

    A run that crashed (its process or its machine died) or that no worker starts is started again, at most three times.
    If a run that was declared crashed is heard of again, it goes on, and the run that replaced it is cancelled. When an
    exception leaves this call (a cancelled flow run), the runs are cancelled.

    Raises `StageFailed` when the pool has no worker for `settings.worker.pending_s`.
    """
    done: dict[str, Outcome] = {}
    watch = _Watch(pool, settings)
    with get_client(sync_client=True) as client, _cancelled_with_the_caller(client) as under_way:
        for key, job in jobs.items():
            under_way[key] = _Attempts()
            _start(under_way[key], flow_name, pool, job)
        while under_way:
            time.sleep(POLL_INTERVAL_S)
            found = watch.read(client, under_way)
            for key, runs in found.items():
                attempts = under_way[key]
                outcome = _outcome(runs, attempts, settings)
                if outcome:
                    _end(client, runs, settings)
                    del under_way[key]
                    done[key] = outcome
                elif living := [run for run in runs if not _lost(run, settings)]:
                    _keep_the_furthest(client, attempts, living, jobs[key].name, settings)
                else:
                    lost = _lost(runs[-1], settings)
                    get_run_logger().warning("%s: %s It is started again.", jobs[key].name, lost)
                    _end(client, runs[-1:], settings)
                    _start(attempts, flow_name, pool, jobs[key])
            on_progress(len(done), len(jobs), _states(jobs, found))
            watch.look_at_workers(client, [run for runs in found.values() for run in runs])
    return done


def _states(jobs: Mapping[str, Job], found: Mapping[str, Sequence[FlowRun]]) -> str:
    """Return the newest state of each job under way, in words."""
    newest = {key: runs[-1].state for key, runs in found.items() if runs}
    named = {key: str(state.name).lower() for key, state in newest.items() if state}
    return ", ".join(f"{key} {named[key]}" for key in jobs if key in named)


def _start(attempts: _Attempts, flow_name: str, pool: str, job: Job) -> None:
    run = run_deployment(
        f"{flow_name}/{pool}",
        parameters=dict(job.parameters),
        flow_run_name=job.name,
        timeout=0,
        as_subflow=True,
        # The client sends a request again whose answer was lost, and a second run would build the same.
        idempotency_key=f"{attempts.key}-{attempts.started}",
    )
    assert isinstance(run, FlowRun)
    attempts.run_ids.append(run.id)
    attempts.started += 1


def _outcome(runs: Sequence[FlowRun], attempts: _Attempts, settings: Settings) -> Outcome | None:
    """Return the end of a job by its runs: the first that completed, else one that failed or was cancelled.

    Lost runs end it only if all are lost and no other may be started.
    """
    ended = [run for run in runs if run.state and run.state.is_final() and not run.state.is_crashed()]
    for run in sorted(ended, key=lambda run: run.state_type != StateType.COMPLETED):
        assert run.state
        return Outcome(str(run.id), None if run.state.is_completed() else run.state.message or run.state.name)
    lost = [_lost(run, settings) for run in runs]
    return Outcome(str(runs[-1].id), lost[-1]) if all(lost) and attempts.started >= ATTEMPTS else None


def _keep_the_furthest(
    client: SyncPrefectClient, attempts: _Attempts, living: Sequence[FlowRun], name: str, settings: Settings
) -> None:
    """Of several living runs of a job keep the one that has run for the longest time, and cancel the others."""
    furthest = max(living, key=lambda run: run.estimated_run_time)  # Prefect gives one that never ran a start time too
    others = [run for run in living if run is not furthest]
    if others:
        get_run_logger().warning("%s: %s gave a late sign of life and goes on.", name, furthest.id)
    for run in others:
        attempts.run_ids.remove(run.id)
    _end(client, others, settings)


def _lost(run: FlowRun, settings: Settings) -> str | None:
    """Return why a run is lost, or None."""
    state = run.state
    if state is None:
        return None
    if state.is_crashed():
        return f"The run crashed: {state.message or 'its process was killed'}"
    waited_s = (datetime.now(UTC) - state.timestamp).total_seconds()
    if state.is_pending() and waited_s > settings.worker.pending_s:
        return f"A worker accepted the run but did not start it within {waited_s:.0f} s."
    return None


def _end(client: SyncPrefectClient, runs: Iterable[FlowRun], settings: Settings) -> None:
    """End runs that another run replaces: a lost one at once, another by its worker."""
    for run in runs:
        if run.state and not run.state.is_final():
            state = Crashed if _lost(run, settings) else Cancelling
            client.set_flow_run_state(run.id, state(message="Replaced by another run."), force=state is Crashed)


@contextlib.contextmanager
def _cancelled_with_the_caller(client: SyncPrefectClient) -> Iterator[dict[str, _Attempts]]:
    under_way: dict[str, _Attempts] = {}
    try:
        yield under_way
    except BaseException:
        for run_id in [run_id for attempts in under_way.values() for run_id in attempts.run_ids]:
            with contextlib.suppress(httpx.HTTPError, ObjectNotFound):
                client.set_flow_run_state(run_id, Cancelling(message="The run that started it has ended."))
        raise


class _Watch:
    """Reads the runs, also across a restart of the server, and reports when the pool has no worker for them."""

    def __init__(self, pool: str, settings: Settings) -> None:
        self._pool = pool
        self._settings = settings
        self._heard_at = time.monotonic()
        self._staffed_at = time.monotonic()
        self._looked_at = 0.0

    def read(self, client: SyncPrefectClient, under_way: Mapping[str, _Attempts]) -> dict[str, list[FlowRun]]:
        try:
            runs = {
                key: [client.read_flow_run(run_id) for run_id in attempts.run_ids]
                for key, attempts in under_way.items()
            }
        except httpx.HTTPError as error:
            if time.monotonic() - self._heard_at > WITHOUT_API_S:
                raise StageFailed(f"Prefect's API does not answer: {error}.", "Start the server again.") from error
            return {}
        self._heard_at = time.monotonic()
        return runs

    def look_at_workers(self, client: SyncPrefectClient, runs: Sequence[FlowRun]) -> None:
        now = time.monotonic()
        if now - self._looked_at < TELL_INTERVAL_S:
            return
        self._looked_at = now
        if not any(run.state and run.state.is_scheduled() for run in runs):
            self._staffed_at = now
            return
        try:
            online = _online(client, self._pool)
        except httpx.HTTPError:
            return
        if online:
            self._staffed_at = now
        elif now - self._staffed_at > self._settings.worker.pending_s:
            raise StageFailed(
                f"The work pool {self._pool!r} has had no worker online for {now - self._staffed_at:.0f} s.",
                f"Start one: slmops up --pool {self._pool}",
            )
        else:
            get_run_logger().warning("The work pool %r has no worker online.", self._pool)
