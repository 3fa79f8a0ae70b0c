"""The flow `regate`, and with it the qualification of a version, with exams that answer immediately."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas import State
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.deployments.cli import app as cli
from slmops.flows.qualify import DeployEnded
from slmops.flows.regate import regate
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.genai.calls import SweptRequest
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks import workshop
from slmops.tasks.environment import checks
from slmops.tasks.exams import on_workers, together
from slmops.tasks.exams.source_lengths import SOURCE_LENGTHS, SourceLengths, SourceLengthsExam
from slmops.tasks.report.markdown import to_markdown
from slmops.tasks.runs.stage import final_state
from slmops.tasks.versions import qualification
from slmops.tasks.versions.champion import Standing
from tests.support import reports
from tests.support.errors import coded
from tests.support.measurements import swept_row
from tests.support.versions import BUILDER, SOURCE, add_evidence, evidence, store_version, stored_variant


class AtOnce:
    """Exams that answer without a model, by their ids; an answer that is an exception is raised."""

    def __init__(self) -> None:
        genai, foundry = reports.endurance("int4")
        self.answers: dict[str, Any] = {
            "evaluate": reports.evaluation("int4"),
            "measure": reports.measurement("int4"),
            "exercise-genai": genai,
            "exercise-foundry": foundry,
            "parity": reports.parity(),
        }
        self.asked: list[str] = []
        self.rows: Any = ()

    def examine(self, exam: Any, variant: Any) -> Any:
        """Answer as `examine` does."""
        self.asked.append(exam.id)
        if exam.id == "evaluate":
            self.rows = exam.evaluation.rows
        answer = self.answers[exam.id]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def exams(monkeypatch: pytest.MonkeyPatch) -> AtOnce:
    at_once = AtOnce()
    for module in (qualification, on_workers, together):
        monkeypatch.setattr(module, "examine", at_once.examine)
    monkeypatch.setattr(together, "run_abreast", lambda works: [work() for work in works])
    found = {
        "register_variant": SimpleNamespace(changed=True, notes=("registered",), model_id="home-int4-generic-cpu:1"),
        "prove_variant": SimpleNamespace(text="It is on.", notes=()),
        "unregister_variant": ["home-int4-generic-cpu:1"],
    }
    for name, result in found.items():
        monkeypatch.setattr(qualification, name, lambda *asked, result=result: result)
    monkeypatch.setattr(import_module("slmops.flows.regate"), "prepare_source", lambda *asked: None)
    monkeypatch.setattr(
        import_module("slmops.flows.qualify"), "settle_champion", lambda *asked, **how: Standing("home:1")
    )
    return at_once


@pytest.fixture
def registry(settings: Settings, server: str, tmp_path: Path) -> Iterator[ModelRegistry]:
    registry = open_registry(settings)
    store_version(registry, tmp_path / "model")
    with temporary_settings({PREFECT_API_URL: server}):
        yield registry


OPEN = {"min_top1_agreement": 0.0, "max_kl_divergence": 1000.0, "max_quality_loss": 1.0}


def test_a_variant_that_passes_is_registered_proven_and_selected(registry: ModelRegistry, exams: AtOnce) -> None:
    state: State[Any] = final_state(regate, "home@1", **OPEN)
    report = state.result()
    assert (state.name, report.status, report.selected) == ("Completed", "registered", "int4")
    (variant,) = report.variants
    assert (variant.answer, variant.foundry_model_id) == ("It is on.", "home-int4-generic-cpu:1")
    assert report.foundry_model_id == "home:1"
    assert exams.asked == ["evaluate", "measure", "parity", "exercise-genai", "exercise-foundry"]
    version = registry.find("home@1")
    assert [record["selected"] for record in evidence(registry, version.manifest, "selection")] == ["int4"]
    assert version.serving is not None


def test_the_torch_process_ends_before_the_soak(
    registry: ModelRegistry, exams: AtOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noted(ChildProcess):
        def close(self) -> None:
            exams.asked.append("end of torch")
            super().close()

    monkeypatch.setattr(workshop, "torch_process", lambda _settings: Noted())
    final_state(regate, "home@1", **OPEN)
    assert exams.asked[-5:] == ["parity", "end of torch", "exercise-genai", "exercise-foundry", "end of torch"]


def test_the_facts_of_the_deploy_are_reported_again(registry: ModelRegistry, exams: AtOnce) -> None:
    """Among them are the generation parameters that `deploy --model-config` was given."""
    given = {"name": "generation defaults", "value": "none", "read_from": "-", "used": "given: temperature 0.2"}
    deployed = {"variants": [{"precision": "int4", "status": "registered"}], "statements": [given]}
    add_evidence(registry, registry.find("home@1").manifest, "deploy", deployed)
    for _ in range(2):
        report: Any = final_state(regate, "home@1", **OPEN).result()
        assert [said.model_dump() for said in report.statements] == [given]


def test_what_was_built_for_another_machine_is_judged_only_where_its_provider_is(
    registry: ModelRegistry, exams: AtOnce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_variant(registry, tmp_path / "model").model_copy(update={"execution_provider": "webgpu"})
    registry.commit("home", SOURCE, BUILDER, [stored])
    available = ["CPUExecutionProvider"]
    monkeypatch.setattr(checks, "available_providers", lambda settings: tuple(available))
    with pytest.raises(StageFailed, check=coded("environment-unsuitable", "webgpu", "cpu")):
        final_state(regate, "home@2", **OPEN).result()
    assert exams.asked == []
    available.append("WebGpuExecutionProvider")
    report = final_state(regate, "home@2", **OPEN).result()
    assert (report.status, registry.find("home@2").serving is not None) == ("registered", True)


def test_rows_are_asked_in_the_named_mode_and_under_the_versions_schema(
    registry: ModelRegistry, exams: AtOnce, tmp_path: Path
) -> None:
    add_evidence(registry, registry.find("home@1").manifest, "response-format", {"json_schema": {"type": "object"}})
    row = {"messages": [{"role": "user", "content": "On!"}], "expected": "{}"}
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps({**row, "id": name}) for name in "ab"), "utf-8")
    (tmp_path / "schema.json").write_text('{"type": "object"}', "utf-8")
    files = {"evaluation_file": "eval.jsonl", "output_schema_file": "schema.json"}
    exams.answers["constrain"] = StageFailed("no model")
    final_state(regate, "home@1", thinking="both", **{name: str(tmp_path / file) for name, file in files.items()})
    assert [(row.id, row.enable_thinking) for row in exams.rows] == [
        ("a", True),
        ("a (at once)", False),
        ("b", True),
        ("b (at once)", False),
    ]
    assert exams.asked[-1] == "constrain"


def test_a_variant_below_the_gate_is_rejected_and_taken_away(registry: ModelRegistry, exams: AtOnce) -> None:
    state: State[Any] = final_state(regate, "home@1", **{**OPEN, "max_kl_divergence": 0.0})
    ended = state.result(raise_on_failure=False)
    assert isinstance(ended, DeployEnded)
    assert (state.name, ended.exit_code, ended.report.selected) == ("Rejected", 3, None)
    (variant,) = ended.report.variants
    assert variant.reason == "rejected by the gate: kl divergence"
    ((advice,), steps) = (variant.advice, [step.command for step in variant.advice[0].steps])
    assert (advice.check, steps[-1]) == ("kl_divergence", "slmops regate home@1 --allow kl_divergence")
    assert variant.what_to_do.endswith(steps[0])
    assert ended.report.to_contract()["variants"][0]["advice"][0]["meaning"] == advice.meaning
    assert steps[0] in to_markdown(ended.report)
    assert registry.find("home@1").serving is None


def test_a_variant_is_registered_in_spite_of_an_allowed_check_and_everything_reports_it(
    registry: ModelRegistry, exams: AtOnce, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cards: list[str] = []

    def register(variant: Any, description: str, card: str, settings: Settings) -> Any:
        cards.append(card)
        return SimpleNamespace(changed=True, notes=(), model_id="home-int4-generic-cpu:1")

    monkeypatch.setattr(qualification, "register_variant", register)
    strict = {**OPEN, "max_kl_divergence": 0.0}
    report: Any = final_state(regate, "home@1", **strict, allow=["kl_divergence"]).result()
    (variant,) = report.variants
    assert (report.status, variant.status, variant.allowed) == ("registered", "registered", ("kl_divergence",))
    assert "where kl divergence was allowed to fail" in report.reason
    assert any("kl divergence failed and was allowed" in text for text in variant.warnings)
    assert report.to_contract()["variants"][0]["allowed"] == ["kl_divergence"]
    told = "Registered although it failed, because that was allowed: kl divergence"
    assert told in to_markdown(report)
    assert told in cards[0]
    manifest = registry.find("home@1").manifest
    (verdict,) = evidence(registry, manifest, "verdict")
    assert [check["name"] for check in verdict["checks"] if check.get("allowed")] == ["kl_divergence"]

    capsys.readouterr()
    assert cli.run(["list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["models"]
    assert listed["variants"][0]["allowed"] == ["kl_divergence"]
    assert cli.run(["list"]) == 0
    assert "IN SPITE OF" in capsys.readouterr().out

    with pytest.raises(BadInput, check=coded("check-not-allowable", "finite_logits", "kl_divergence")):
        regate("home@1", **strict, allow=["finite_logits"])


def test_a_length_without_an_answer_is_no_fault_where_the_source_has_none_either(
    registry: ModelRegistry, exams: AtOnce, settings: Settings
) -> None:
    silent = SweptRequest.model_validate(swept_row(64, 4.0, answered=False))
    measured = reports.measurement("int4").model_copy(update={"sweep": (silent,)})
    exams.answers["measure"] = measured
    state: State[Any] = final_state(regate, "home@1", **OPEN)
    (variant,) = state.result(raise_on_failure=False).report.variants
    assert variant.reason == "rejected by the gate: valid lengths"

    (stored,) = registry.find("home@1").variants
    asked = SourceLengthsExam(measured, None, None)
    answer = SourceLengths(prompt_tokens=(64,), answered=(False,))
    stored.version.record(SOURCE_LENGTHS, answer, asked.key(stored, settings), beside=asked.record(stored, settings))
    exams.answers["source lengths"] = answer
    report: Any = final_state(regate, "home@1", **OPEN).result()
    assert report.status == "registered"
    assert "like the source checkpoint" in to_markdown(report)


def test_figures_of_a_busy_machine_are_flagged_and_decide_no_budget(registry: ModelRegistry, exams: AtOnce) -> None:
    exams.answers["measure"] = reports.measurement("int4").model_copy(update={"others_cpu_share": 0.6, "rounds": 3})
    report: Any = final_state(regate, "home@1", **OPEN).result()
    (variant,) = report.to_contract()["variants"]
    assert variant["reliable"] is False
    assert "other programs used 60%" in variant["warnings"][0]
    assert "other programs used 60%" in to_markdown(report)
    state: State[Any] = final_state(regate, "home@1", **OPEN, budget=["min-tps=100000"])
    ended = state.result(raise_on_failure=False)
    assert isinstance(ended, DeployEnded)
    assert (ended.exit_code, "undecided whether int4" in ended.report.reason) == (3, True)
    kept: Any = final_state(regate, "home@1", **OPEN, budget=["max-size=1GB", "min-tps=1"]).result()
    assert kept.selected == "int4"


def test_an_exam_that_fails_is_reported_for_its_variant(registry: ModelRegistry, exams: AtOnce) -> None:
    exams.answers["measure"] = StageFailed("The model does not load.")
    state: State[Any] = final_state(regate, "home@1", **OPEN)
    ended = state.result(raise_on_failure=False)
    assert isinstance(ended, DeployEnded)
    assert (state.name, ended.exit_code) == ("Failed", 1)
    (variant,) = ended.report.variants
    assert (variant.status, variant.error) == ("failed", "The model does not load.")
    assert exams.asked == ["evaluate", "measure"]


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"reference": "home@9"}, coded("version-missing", "home@9")),
        ({"reference": "home@1", "budget": ["max-size=much"]}, coded("budget-value-not-valid", "max-size")),
        ({"reference": "home@1", "scorer": "contains"}, coded("bad-input", "without an evaluation file")),
    ],
)
def test_bad_input_is_refused_before_any_exam(
    registry: ModelRegistry, exams: AtOnce, asked: dict[str, Any], refused: coded
) -> None:
    with pytest.raises(BadInput, check=refused):
        regate(**asked)
    assert exams.asked == []
