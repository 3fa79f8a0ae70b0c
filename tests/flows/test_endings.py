"""The end of a run after bad input or a failed stage: its log, its state, and the raised error."""

import logging
import threading
import time

import cloudpickle
import pytest
from prefect import State, flow
from prefect.flow_engine import FlowRunEngine, run_flow
from prefect.logging.handlers import APILogHandler
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect.states import Completed

from slmops.flows.deploy import deploy
from slmops.flows.on_worker import build_variant_on_worker
from slmops.flows.promote import promote
from slmops.infra.errors import BadInput, PassingFault
from slmops.tasks.runs.stage import ends_by_its_errors, final_state, stage
from tests.support.prefect_api import query
from tests.support.s3_proxy import DropAnswer, Fault, FaultProxy


@pytest.fixture(autouse=True)
def api(server, home):
    with temporary_settings({PREFECT_API_URL: server, PREFECT_LOGGING_TO_API_ENABLED: True}):
        yield server


def logs_of(server, run_id):
    deadline = time.monotonic() + 120
    while True:
        logs = query(server, "logs", logs={"flow_run_id": {"any_": [str(run_id)]}})
        if any(log["message"].startswith("Finished in state") and not log["task_run_id"] for log in logs):
            return logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


@stage("refuse", run_name="refuse")
def refuse() -> None:
    raise BadInput("The sky is not a checkpoint.", "Name another one.")


@flow(name="refused by a stage")
@ends_by_its_errors
def refused_by_a_stage() -> None:
    refuse()


@flow(name="broken")
@ends_by_its_errors
def broken() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("refused", "arguments", "sentence"),
    [
        (promote, ("nobody@1",), "The store has no nobody@1."),
        (refused_by_a_stage, (), "The sky is not a checkpoint. Name another one."),
    ],
    ids=["by the flow", "by a stage"],
)
def test_bad_input_is_one_line_in_the_log(server, refused, arguments, sentence):
    state = refused(*arguments, return_state=True)
    assert isinstance(state.result(raise_on_failure=False), BadInput)
    assert sentence in state.message
    logs = logs_of(server, state.state_details.flow_run_id)
    assert [log["message"] for log in logs if "Traceback" in log["message"]] == []
    assert [sentence in log["message"] for log in logs if log["name"] == "prefect.flow_runs"].count(True) == 1
    with pytest.raises(BadInput, check=lambda error: sentence in str(error)):
        refused(*arguments)


@pytest.mark.parametrize("run", [deploy, promote, build_variant_on_worker], ids=lambda run: run.name)
def test_prefect_can_hand_a_flow_to_the_process_of_its_run(run):
    assert cloudpickle.dumps(run)


@flow(name="counted")
@ends_by_its_errors
def counted() -> State[int]:
    refused_by_a_stage(return_state=True)
    return Completed(message="It is three.", data=3)


@pytest.mark.filterwarnings("ignore:Logger 'prefect.flow_runs' attempted to send logs")
@pytest.mark.parametrize(("run", "outcome"), [(counted, 3), (refused_by_a_stage, BadInput("The sky"))])
def test_a_run_has_its_outcome_though_the_answer_to_its_last_state_is_lost(server, run, outcome):
    with (
        FaultProxy(server.removesuffix("/api")) as proxy,
        temporary_settings({PREFECT_API_URL: f"{proxy.endpoint_url}/api"}),
    ):
        # Each state is sent at least once again, the last one too.
        proxy.add(Fault("POST", "/set_state$", DropAnswer(), every=2))
        found = final_state(run).result(raise_on_failure=False)
        APILogHandler().flush()  # while the proxy answers: this process would try for a minute to send the rest
    assert type(found) is type(outcome)
    assert str(found).startswith(str(outcome))


def test_a_run_with_signs_of_life_ends_without_their_thread_which_sleeps_for_a_second(monkeypatch):
    signs, waited_for = [], []
    wait, sign = threading.Thread.join, FlowRunEngine._emit_flow_run_heartbeat

    def joined(thread, timeout=None):
        waited_for.append(timeout)
        wait(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", joined)
    monkeypatch.setattr(
        FlowRunEngine, "_emit_flow_run_heartbeat", lambda *given: (signs.append(given), sign(*given))[1]
    )
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
        assert final_state(counted).result() == 3
    assert len(signs) == 2  # its own, and that of the flow within
    assert [limit for limit in waited_for if limit is not None] == []


@pytest.mark.filterwarnings("ignore:Logger 'prefect.flow_runs' attempted to send logs")
@pytest.mark.parametrize("logger", ["prefect.flow_runs", "prefect.engine"])
def test_the_engine_of_a_worker_adds_no_traceback_of_bad_input(logger):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger(logger).addHandler(handler)
    try:
        with pytest.raises(BadInput):  # as the engine has it, which gives the run's logger
            run_flow(refused_by_a_stage, error_logger=logging.getLogger(logger))
        with pytest.raises(ZeroDivisionError):
            run_flow(broken, error_logger=logging.getLogger(logger))
    finally:
        logging.getLogger(logger).removeHandler(handler)
    unexpected = [record for record in records if record.msg == "Engine execution exited with unexpected exception"]
    assert [record.exc_info[0] for record in unexpected] == [ZeroDivisionError]


class TestTriedAgain:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch):
        monkeypatch.setattr("slmops.tasks.runs.stage.RETRY_DELAYS_S", [0.0, 0.0])

    @pytest.mark.parametrize(("fault", "attempts"), [(PassingFault("lost"), 3), (BadInput("wrong"), 1)])
    def test_only_what_may_pass_is_tried_again(self, fault, attempts):
        tried = []

        @stage("try")
        def attempt(live: object) -> None:
            tried.append(live)
            raise fault

        @flow
        def trying() -> None:
            attempt(object())

        with pytest.raises(type(fault)):
            trying()
        assert len(tried) == attempts

    def test_a_live_object_is_no_error_in_the_log(self, server):
        @stage("hold")
        def hold(live: object) -> None:
            del live

        @flow
        def holding() -> None:
            hold(threading.Lock())

        state = holding(return_state=True)
        logs = logs_of(server, state.state_details.flow_run_id)
        assert [log["message"] for log in logs if log["level"] >= logging.WARNING] == []
