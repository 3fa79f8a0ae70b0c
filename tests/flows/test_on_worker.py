"""The flows of a pool's workers: an order is executed here and its result returned through the store."""

from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas import State
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.flows.on_worker import build_variant_on_worker, measure_variant_on_worker
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.settings import GateSettings, Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.orders import give_order, take_back
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.build.variants import BuildOrder
from slmops.tasks.exams import on_workers
from slmops.tasks.exams.endurance import Endurance, EnduranceExam
from slmops.tasks.exams.exam import Exam
from slmops.tasks.exams.measurement import MeasurementExam
from slmops.tasks.exams.on_workers import Examined, ExamOrder, answered, examine_on_workers, exams_of_a_device
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.runs.orders import HandedBack, Order
from slmops.tasks.runs.stage import final_state
from slmops.tasks.workshop import Workshop, working_in, workshop
from tests.support.errors import coded
from tests.support.measurements import make_measurement
from tests.support.versions import store_version

ROWS = (EvaluationRow.model_validate({"id": 1, "messages": [{"role": "user", "content": "Hello?"}]}),)
MEASUREMENT = make_measurement()
GATE = GateSettings(max_cliff_ratio=7)


def at_once(exam: Exam[Any], variant: Any) -> Any:
    """Answer an exam without opening the model, by the limits of the deploy that asks."""
    assert workshop().settings.gate == GATE
    if isinstance(exam, EnduranceExam):
        return Endurance(runtime=exam.runtime, memory=None, edge_inputs=(), notes=(), versions={}, wall_s=1.0)
    return MEASUREMENT


@pytest.fixture
def registry(settings: Settings, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(on_workers, "examine", at_once)
    found = open_registry(settings)
    store_version(found, tmp_path / "model")
    with temporary_settings({PREFECT_API_URL: server}):
        yield found


def test_a_worker_takes_exams_by_name_and_hands_their_answers_back(registry: ModelRegistry) -> None:
    asked = ExamOrder(exams=("measure", "exercise-foundry"), rows=ROWS, gate=GATE)
    order = give_order(registry, asked.model_dump(mode="json"))
    state: State[Any] = final_state(measure_variant_on_worker, "home@1", "int4", order)
    assert state.is_completed()
    result = take_back(registry, order, str(state.state_details.flow_run_id))
    assert result is not None
    found, variant = Examined.model_validate(result), registry.find("home@1").variant("int4")
    assert answered(MeasurementExam(), variant, found) == MEASUREMENT
    assert answered(EnduranceExam("foundry", ROWS), variant, found).runtime == "foundry"
    with pytest.raises(KeyError):
        answered(EnduranceExam("genai", ROWS), variant, found)


@pytest.mark.parametrize(("order", "code"), [("0" * 32, "order-missing"), ("../models", "order-not-valid")])
def test_an_order_that_is_not_there_is_refused(registry: ModelRegistry, order: str, code: str) -> None:
    with pytest.raises(BadInput, check=coded(code, order)):
        measure_variant_on_worker("home@1", "int4", order)


def test_a_worker_with_another_builder_builds_nothing(registry: ModelRegistry) -> None:
    asked = BuildOrder(checkpoint="store://x", digest="0" * 64, builder={"olive-ai": "0.1"}, request={}, recipe={})
    order = give_order(registry, asked.model_dump(mode="json"))
    with pytest.raises(StageFailed, check=coded("builder-of-other-versions", "olive-ai ", " (wanted: 0.1)")):
        build_variant_on_worker("home", "int4", order)
    assert [entry.key for entry in registry.objects.entries(f"work/{order}")] == [f"work/{order}/order.json"]


def test_a_deploy_takes_what_workers_found_and_what_they_could_not_do(
    registry: ModelRegistry, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = registry.find("home@1")
    variant = version.variant("int4")
    worker = settings.worker.model_copy(update={"pool": "here"})
    shop = Workshop(settings.model_copy(update={"worker": worker, "gate": GATE}), registry)

    def handed_back(flow_name: str, pool: str, orders: dict[str, Order]) -> HandedBack:
        assert (flow_name, pool, list(orders)) == ("measure-variant", "here", ["int4"])
        order = orders["int4"]
        assert (order.run_name, order.parameters) == (
            "measure-home-int4",
            {"reference": "home@1", "precision": "int4"},
        )
        assert isinstance(order.content, ExamOrder)
        with working_in(Workshop(settings, registry)):  # another machine, with an environment of its own
            examined = on_workers.examine_ordered(order.content, variant)
        return HandedBack({"int4": examined.model_dump(mode="json")})

    monkeypatch.setattr(on_workers, "order_on_pool", handed_back)
    with working_in(shop):
        elsewhere = examine_on_workers(version, ROWS)["int4"]
    found = [answered(exam, variant, elsewhere) for exam in exams_of_a_device(ROWS)]
    assert (found[0], [result.runtime for result in found[1:]]) == (MEASUREMENT, ["genai", "foundry"])

    monkeypatch.setattr(on_workers, "order_on_pool", lambda *asked: HandedBack(errors={"int4": "Its machine is gone."}))
    with working_in(shop):
        lost = examine_on_workers(version, ROWS)["int4"]
    with pytest.raises(StageFailed, check=coded("stage-failed", "Its machine is gone.")):
        answered(MeasurementExam(), variant, lost)


def test_without_a_pool_variants_are_examined_here(registry: ModelRegistry, settings: Settings) -> None:
    version = registry.find("home@1")
    with working_in(Workshop(settings.model_copy(update={"gate": GATE}), registry)):
        assert examine_on_workers(version, ROWS) == {}
        assert answered(MeasurementExam(), version.variant("int4"), None) == MEASUREMENT
