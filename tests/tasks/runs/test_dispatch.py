"""Runs on a pool whose workers are slow, killed or gone, by a real Prefect API; the test is the worker."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Completed, Crashed, Failed, Pending, Running, State

from slmops.infra.settings import Settings
from slmops.tasks.runs import dispatch
from slmops.tasks.runs.dispatch import Job, Outcome, run_on_pool
from tests.support import api_faults
from tests.support.api_faults import faults_of_the_api
from tests.support.threads import in_thread

DEADLINE_S = 240


def lost() -> State[object]:
    return Crashed(message="No sign of life for 90 s.")


class Pool:
    """A work pool with one job under way, and the runs that workers were given for it, oldest first."""

    def __init__(self, client: SyncPrefectClient, settings: Settings) -> None:
        self.client = client
        self.name = f"pool-{uuid4().hex[:8]}"
        client.create_work_pool(WorkPoolCreate(name=self.name, type="process"))
        flow_id = client.create_flow_from_name("build-variant")
        client.create_deployment(flow_id=flow_id, name=self.name, work_pool_name=self.name)
        self.job: Future[dict[str, Outcome]] = in_thread(lambda: self._work(settings))

    def _work(self, settings: Settings) -> dict[str, Outcome]:
        @flow
        def deploying() -> dict[str, Outcome]:
            return run_on_pool("build-variant", self.name, {"int4": Job(f"build-{self.name}", {})}, settings)

        return deploying()

    def runs(self) -> list[FlowRun]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

        wanted = FlowRunFilter(name=FlowRunFilterName(any_=[f"build-{self.name}"]))
        found = self.client.read_flow_runs(flow_run_filter=wanted)
        return sorted(found, key=lambda run: run.created or run.expected_start_time)

    def wait_for(self, reached: Callable[[list[FlowRun]], bool]) -> list[FlowRun]:
        deadline = time.monotonic() + DEADLINE_S
        while not reached(runs := self.runs()):
            assert time.monotonic() < deadline, [run.state for run in runs]
            time.sleep(0.02)
        return runs

    def run(self, number: int) -> UUID:
        """The id of the run of an attempt, which is waited for."""
        return self.wait_for(lambda runs: len(runs) > number)[number].id

    def report(self, run_id: UUID, *states: State[object]) -> None:
        """Report states as the process of a run, or the server in its place, does."""
        for state in states:
            self.client.set_flow_run_state(run_id, state)

    def ended(self) -> Outcome:
        return self.job.result(DEADLINE_S)["int4"]


@pytest.fixture
def pool(server: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setattr(dispatch, "POLL_INTERVAL_S", 0.02)
    with (
        temporary_settings({PREFECT_API_URL: server, PREFECT_LOGGING_TO_API_ENABLED: False}),
        get_client(sync_client=True) as client,
    ):
        pool = Pool(client, settings)
        yield pool
        if not pool.job.done():  # after a failed test
            for run in pool.runs():
                client.set_flow_run_state(run.id, Failed(message="The test has ended."), force=True)
            pool.job.exception(DEADLINE_S)


def test_a_late_sign_of_life_withdraws_the_verdict(pool: Pool) -> None:
    first = pool.run(0)
    pool.report(first, Pending(), Running(), lost())
    second = pool.run(1)
    pool.report(first, Running(message="A late sign of life."))
    runs = pool.wait_for(lambda runs: runs[1].state_type in (StateType.CANCELLED, StateType.CANCELLING))
    assert [run.id for run in runs] == [first, second]  # nothing is done a third time
    pool.report(first, Completed())
    assert pool.ended() == Outcome(str(first))


def test_a_late_run_that_has_completed_counts(pool: Pool) -> None:
    first = pool.run(0)
    pool.report(first, Pending(), Running(), lost())
    second = pool.run(1)
    pool.report(second, Pending(), Running())
    pool.report(first, Completed())
    assert pool.ended() == Outcome(str(first))
    pool.wait_for(lambda runs: runs[1].state_type in (StateType.CANCELLED, StateType.CANCELLING))


def test_the_run_that_began_first_goes_on_though_it_is_the_second(pool: Pool) -> None:
    first = pool.run(0)
    pool.report(first, lost())  # it had not begun
    second = pool.run(1)
    pool.report(second, Pending(), Running())
    pool.report(first, Running())
    pool.wait_for(lambda runs: runs[0].state_type == StateType.CANCELLING)
    pool.report(second, Completed())
    assert pool.ended() == Outcome(str(second))


def test_a_lost_run_is_started_three_times_at_most(pool: Pool) -> None:
    for number in range(3):
        pool.report(pool.run(number), Pending(), Running(), lost())
    assert pool.ended() == Outcome(str(pool.run(2)), "The run crashed: No sign of life for 90 s.")


def test_a_run_that_failed_is_not_started_again(pool: Pool) -> None:
    pool.report(pool.run(0), Pending(), Running(), Failed(message="No room."))
    assert pool.ended() == Outcome(str(pool.run(0)), "No room.")
    assert len(pool.runs()) == 1


def test_a_run_whose_start_the_server_does_not_confirm_is_started_once(pool: Pool) -> None:
    pool.run(0)
    with faults_of_the_api(api_faults.lost("POST", "/create_flow_run$"), api_faults.busy("POST", "/create_flow_run$")):
        pool.report(pool.run(0), lost())
        pool.report(pool.run(1), Pending(), Running(), Completed())
        assert pool.ended() == Outcome(str(pool.run(1)))
    assert len(pool.runs()) == 2
