"""The flow `retrain` with a fine-tuning and a deploy that end at once: the outcome for the candidate."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas import State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed

from slmops.flows.qualify import DeployEnded
from slmops.flows.retrain import RetrainEnded, retrain
from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.estimates import Estimate
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.runs.stage import final_state
from slmops.tasks.training import comparison
from slmops.tasks.training.comparison import Challenge, RetrainReport
from slmops.tasks.training.fine_tune import FineTuning, Hyperparameters
from tests.support import reports
from tests.support.errors import coded
from tests.support.prefect_api import query, wait_for_lineage
from tests.support.versions import SOURCE, store_version

CHAT = '{"messages": [{"role": "user", "content": "light %d"}, {"role": "assistant", "content": "on %d"}]}\n'


class Stages:
    """Results of the stages before the comparison."""

    def __init__(self, registry: ModelRegistry, folder: Path) -> None:
        self.registry, self.folder = registry, folder
        self.rows = reports.evaluation_rows()
        self.gain = Estimate(value=0.2, low=0.1, high=0.3)
        self.selected: str | None = "int4"
        self.deployed: list[dict[str, Any]] = []
        self.promoted: list[str] = []

    def deploy(self, **asked: Any) -> State[Any]:
        """Store the candidate as the next version."""
        self.deployed.append(asked)
        number = len(self.deployed) + 1
        store_version(self.registry, self.folder / str(number), {"model.onnx": b"candidate %d" % number})
        status = "registered" if self.selected else "rejected"
        report = reports.full_report(name="home", version=number, selected=self.selected, status=status)
        if self.selected:
            return Completed(data=report)
        return Failed(data=DeployEnded(report))

    def fine_tune(
        self, dataset: Any, base: PreparedCheckpoint, hyperparameters: Hyperparameters, settings: Settings
    ) -> Any:
        """Return a record of the question."""
        from slmops.tasks.training.fine_tune import key_of

        fields: dict[str, Any] = dict.fromkeys(FineTuning.model_fields, 1) | {
            "key": key_of(dataset, base, hyperparameters),
            "dataset": "chats.jsonl",
            "dataset_fingerprint": dataset.fingerprint,
            "base": base.origin,
            "base_digest": base.digest,
            "hyperparameters": hyperparameters,
            "losses": (),
            "device": "cpu",
            "versions": {},
        }
        return "checkpoint", FineTuning(**fields)

    def promote(self, reference: str, reason: str, *, return_state: bool) -> State[Any]:
        """Note what was promoted."""
        self.promoted.append(reference)
        return Completed(message=reason, data=reference)

    def challenge(self, challenger: Any, champion: Any, evaluation: EvaluationSet) -> Challenge:
        """Return the configured gain."""
        score = Estimate(value=0.5, low=0.4, high=0.6)
        return Challenge(
            champion=champion.reference,
            challenger=challenger.reference,
            rows=len(evaluation.rows),
            champion_score=score,
            challenger_score=score,
            gain=self.gain,
        )


@pytest.fixture
def stages(settings: Settings, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stages]:
    """home@1 is the champion."""
    registry = open_registry(settings)
    store_version(registry, tmp_path / "1")
    registry.set_alias("home", CHAMPION, 1, "the first")
    stages, flow = Stages(registry, tmp_path), import_module("slmops.flows.retrain")
    (tmp_path / "chats.jsonl").write_text("".join(CHAT % (number, number) for number in range(8)), "utf-8")
    base = PreparedCheckpoint.model_construct(origin="base", uri=tmp_path.as_uri(), digest="b" * 64)
    monkeypatch.setattr(flow, "prepare_base", lambda *asked: base)
    monkeypatch.setattr(flow, "read_evaluation", lambda *asked: EvaluationSet(rows=stages.rows, origin="eval.jsonl"))
    monkeypatch.setattr(flow, "fine_tune_once", stages.fine_tune)
    monkeypatch.setattr(flow, "deploy", stages.deploy)
    monkeypatch.setattr(flow, "promote", stages.promote)
    monkeypatch.setattr(comparison, "challenge_champion", stages.challenge)
    with temporary_settings({PREFECT_API_URL: server}):
        yield stages


def run(stages: Stages, **options: Any) -> RetrainReport:
    state: State[Any] = final_state(retrain, str(stages.folder / "chats.jsonl"), "base", "home", **options)
    result = state.result(raise_on_failure=False)
    if isinstance(result, RetrainEnded):
        return result.report  # type: ignore[no-any-return]
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, RetrainReport)
    return result


def test_a_better_candidate_is_promoted_and_the_same_question_is_skipped(stages: Stages, server: str) -> None:
    report = run(stages, max_kl_divergence=0.3)
    assert (report.status, report.version, stages.promoted) == ("promoted", 2, ["home@2"])
    assert stages.deployed[0]["max_kl_divergence"] == 0.3
    assert "home@2 is better than home@1" in report.summary
    assert len(Path(stages.deployed[0]["calibration_file"]).read_text("utf-8").splitlines()) == 8
    again = run(stages)
    assert (again.status, again.version) == ("skipped", 2)
    assert len(stages.deployed) == 1
    (shown,) = query(server, "artifacts/latest", artifacts={"key": {"any_": ["slmops-retrain-home"]}})
    assert shown["data"].startswith(
        "# home: retrain skipped\n\n**Nothing has changed since home@2 (promoted): skipped.**"
    )
    assert "[The report of home](../key/slmops-home)" in shown["data"]
    assert run(stages, force=True).version == 3
    assert report.fine_tuning
    made_from = [f"dataset://sha256/{report.fine_tuning.dataset_fingerprint}", f"checkpoint://sha256/{'b' * 64}"]
    wait_for_lineage(server, {f"checkpoint://sha256/{SOURCE.digest}": made_from})


@pytest.mark.parametrize(
    ("gain", "options"),
    [((0.1, -0.1, 0.3), {}), ((0.2, 0.1, 0.3), {"promotion": "never"})],
    ids=["not beyond noise", "never"],
)
def test_a_candidate_that_may_not_take_its_place_leaves_the_champion(
    stages: Stages, gain: tuple[float, float, float], options: dict[str, Any]
) -> None:
    stages.gain = Estimate(value=gain[0], low=gain[1], high=gain[2])
    report = run(stages, **options)
    assert (report.status, stages.promoted) == ("kept", [])
    assert report.summary.endswith("home@1 stays the champion.")


def test_a_candidate_that_the_gate_keeps_out_ends_the_run(stages: Stages) -> None:
    stages.selected = None
    report = run(stages)
    assert (report.status, stages.promoted) == ("rejected", [])
    assert report.summary.startswith("The candidate was rejected: ")


def test_rows_without_answers_compare_nothing(stages: Stages) -> None:
    stages.rows = tuple(row.model_copy(update={"expected": None}) for row in stages.rows)
    with pytest.raises(BadInput, check=coded("evaluation-file-not-named")):
        run(stages)
    assert stages.deployed == []
