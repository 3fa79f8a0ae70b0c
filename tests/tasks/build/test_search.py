"""The search over recipes: what is chosen and why, and that nothing is done twice."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.call import Call
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import BenchmarkSettings, EvaluationSettings, GateSettings, MachineSettings, Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.build.build import BuiltVariant
from slmops.tasks.build.recipes import Recipe
from slmops.tasks.build.search import SearchOutcome, Trial, choose_recipes, last_search, record_trials, search_recipes
from slmops.tasks.checkpoint.inspection import content_digest, inspect_checkpoint
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.answers import AnswersExam
from slmops.tasks.exams.exam import examine
from slmops.tasks.exams.measurement import MeasurementExam
from slmops.tasks.plan import parse_request
from slmops.tasks.questions.evaluation_set import EvaluationSet, chat_prompts
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.progress import listening
from slmops.tasks.verdict.pareto import Candidate
from slmops.tasks.versions.commit import commit_version
from slmops.tasks.workshop import Workshop, working_in
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model
from tests.support.torch_process import TORCH_PROCESS
from tests.support.versions import evidence

ROWS = 20
RIGHT = (1.0,) * ROWS


def _request(**parameters: Any) -> DeployRequest:
    return parse_request({"checkpoint": "here", "name": "home", "search": True, **parameters})


def _trial(name: str, *, passed_gate: bool = True, **figures: float | None) -> Trial:
    usual: dict[str, Any] = {
        "size_bytes": 1_000_000,
        "peak_rss_bytes": 100_000_000,
        "ttft_ms": 100.0,
        "token_generation_throughput_tps": 20.0,
        "quality_loss": 0.0,
        "kl_divergence": 0.01,
    }
    candidate = Candidate(**{"name": name, **usual, **figures})
    return Trial(recipe=name, precision=name.partition("-")[0], candidate=candidate, passed_gate=passed_gate)


def _choose(*trials: Trial, scores: dict[str, tuple[float, ...]] | None = None, **parameters: Any) -> SearchOutcome:
    all_right = {trial.recipe: RIGHT for trial in trials}
    return choose_recipes(trials, all_right if scores is None else scores, _request(**parameters))


def _of(outcome: SearchOutcome, name: str) -> Trial:
    return next(trial for trial in outcome.trials if trial.recipe == name)


class TestChoice:
    def test_of_equal_quality_the_fastest_is_chosen_in_each_precision(self) -> None:
        outcome = _choose(
            _trial("int8", token_generation_throughput_tps=15.0),
            _trial("int4"),
            _trial("int4-fast", token_generation_throughput_tps=30.0, size_bytes=1_200_000),
            _trial("int4-slow", token_generation_throughput_tps=10.0),
        )
        assert outcome.chosen == {"int8": "int8", "int4": "int4-fast"}
        assert _of(outcome, "int4").on_front
        assert "slower" in _of(outcome, "int4").reason
        slow = _of(outcome, "int4-slow")
        assert (slow.on_front, slow.dominated_by) == (False, "int4")
        assert "int4 is better" in slow.reason
        assert all(trial.reason for trial in outcome.trials)
        assert "budget" not in "".join(trial.reason for trial in outcome.trials)

    def test_at_like_speed_the_smallest_is_chosen(self) -> None:
        small = _trial("int4-small", size_bytes=900_000, token_generation_throughput_tps=19.5, kl_divergence=0.02)
        assert _choose(_trial("int4"), small).chosen == {"int4": "int4-small"}

    def test_a_faster_one_of_measurably_less_quality_is_not_chosen(self) -> None:
        fast = _trial("int4-fast", token_generation_throughput_tps=40.0, quality_loss=0.5)
        scores = {"int4": RIGHT, "int4-fast": (1.0, 0.0) * (ROWS // 2)}
        outcome = _choose(_trial("int4"), fast, scores=scores)
        assert outcome.chosen == {"int4": "int4"}
        assert "0.500 below that of int4" in _of(outcome, "int4-fast").reason

    def test_one_wrong_answer_more_is_no_measurable_loss(self) -> None:
        fast = _trial("int4-fast", token_generation_throughput_tps=40.0, quality_loss=1 / ROWS)
        scores = {"int4": RIGHT, "int4-fast": (*RIGHT[1:], 0.0)}
        assert _choose(_trial("int4"), fast, scores=scores).chosen == {"int4": "int4-fast"}

    def test_without_expected_answers_the_nearest_to_the_reference_is_chosen(self) -> None:
        near = _trial("int4-near", kl_divergence=0.001, size_bytes=1_100_000, quality_loss=None)
        outcome = _choose(_trial("int4", quality_loss=None), near, scores={"int4": (), "int4-near": ()})
        assert outcome.chosen == {"int4": "int4-near"}
        assert "farther from the reference" in _of(outcome, "int4").reason

    def test_a_recipe_that_misses_the_gate_is_chosen_only_if_no_other_ran(self) -> None:
        fast = _trial("int4-fast", passed_gate=False, token_generation_throughput_tps=40.0)
        outcome = _choose(_trial("int4"), fast)
        assert outcome.chosen == {"int4": "int4"}
        assert "gate" in _of(outcome, "int4-fast").reason
        assert not _of(outcome, "int4-fast").on_front
        assert _choose(fast).chosen == {"int4": "int4-fast"}

    def test_the_budget_decides_where_a_recipe_keeps_it(self) -> None:
        small = _trial("int4-small", size_bytes=500_000, token_generation_throughput_tps=15.0)
        assert _choose(_trial("int4"), small).chosen == {"int4": "int4"}
        outcome = _choose(_trial("int4"), small, budget=["max-size=600kB"])
        assert outcome.chosen == {"int4": "int4-small"}
        assert "over the budget" in _of(outcome, "int4").reason
        assert _choose(_trial("int4"), small, budget=["max-size=1kB"]).chosen == {"int4": "int4"}

    def test_a_recipe_that_failed_is_kept_in_the_outcome_and_fails_its_precision_when_alone(self) -> None:
        broken = Trial(recipe="int4", precision="int4", error="It broke.")
        outcome = _choose(broken, _trial("int4-block128"))
        assert outcome.chosen == {"int4": "int4-block128"}
        assert outcome.failures == {}
        alone = _choose(broken, Trial(recipe="int4-k", precision="int4", error="Too."), _trial("int8"))
        assert alone.chosen == {"int8": "int8"}
        assert alone.failures == {"int4": "It broke."}

    @given(
        speeds=st.lists(st.floats(10, 40), min_size=1, max_size=6),
        sizes=st.lists(st.integers(900_000, 1_100_000), min_size=6, max_size=6),
        right=st.lists(st.integers(10, ROWS), min_size=6, max_size=6),
        passed=st.lists(st.booleans(), min_size=6, max_size=6),
        seed=st.integers(0, 100),
    )
    def test_one_per_precision_whatever_the_figures_and_their_order(
        self, speeds: list[float], sizes: list[int], right: list[int], passed: list[bool], seed: int
    ) -> None:
        trials = [
            _trial(
                f"int4-{index}",
                passed_gate=passed[index],
                token_generation_throughput_tps=speed,
                size_bytes=sizes[index],
                quality_loss=1 - right[index] / ROWS,
            )
            for index, speed in enumerate(speeds)
        ]
        scores = {
            trial.recipe: tuple(float(row < right[index]) for row in range(ROWS)) for index, trial in enumerate(trials)
        }
        outcome = _choose(*trials, scores=scores)
        (chosen,) = [trial for trial in outcome.trials if trial.chosen]
        assert chosen.on_front
        assert chosen.passed_gate or not any(trial.passed_gate for trial in trials)
        assert [trial.recipe for trial in outcome.trials] == [trial.recipe for trial in trials]
        assert SearchOutcome.model_validate_json(outcome.model_dump_json()) == outcome
        shuffled = random.Random(seed).sample(trials, len(trials))
        assert _choose(*shuffled, scores=scores).chosen == outcome.chosen


@pytest.fixture
def prefect(server: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: server}):
        yield


@pytest.fixture
def small_settings(home: Path) -> Settings:
    return Settings(
        home=home,
        machine=MachineSettings(threads=1),
        benchmark=BenchmarkSettings(prompt_tokens=(8,), new_tokens=4, repetitions=2),
        evaluation=EvaluationSettings(max_rows=2, max_new_tokens=4),
        gate=GateSettings(min_top1_agreement=0, max_kl_divergence=100),
    )


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedCheckpoint:
    folder = make_tiny_checkpoint(tmp_path / "checkpoint", hidden_size=128)
    return PreparedCheckpoint(
        uri=folder.as_uri(), origin=str(folder), digest=content_digest(folder), inspection=inspect_checkpoint(folder)
    )


@pytest.mark.slow
class TestSearch:
    def test_a_version_takes_the_best_and_nothing_is_done_twice(
        self, prefect: None, prepared: PreparedCheckpoint, small_settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings, registry = small_settings, open_registry(small_settings)
        request = _request(checkpoint=prepared.origin, precisions=["int8"])
        evaluation = EvaluationSet(rows=chat_prompts()[:2], origin="two prompts")

        @flow
        def search() -> tuple[list[BuiltVariant], SearchOutcome]:
            with working_in(Workshop(settings, registry, TORCH_PROCESS)):
                return search_recipes(request, prepared, evaluation)

        with AnswersExam(evaluation).source_in_use(prepared.digest, settings):
            built, outcome = search()
        assert [trial.recipe for trial in outcome.trials] == ["int8", "int8-block128"]
        assert all(trial.candidate and trial.candidate.kl_divergence is not None for trial in outcome.trials)
        (variant,) = [built_variant.variant for built_variant in built]
        assert variant.precision == "int8"
        assert f"cpu-{outcome.chosen['int8']}" == variant.recipe
        assert registry.has_files(variant.files)
        blobs = {entry.key for entry in registry.objects.entries("blobs")}
        assert blobs == {f"blobs/sha256/{file.sha256}" for file in variant.files}

        # Again: no child process is started, for the search or for the version that comes of it.
        def no_child(child: ChildProcess, call: Call[Any], **options: Any) -> None:
            raise AssertionError(f"{call} was run again")

        monkeypatch.setattr(ChildProcess, "run", no_child)
        steps: list[tuple[str, str]] = []
        with listening(lambda stage, share, what: steps.append((stage, what))):
            again = search()
        assert again == (built, outcome)
        assert {("build int8-block128", "built before"), ("measure int8-block128", "measured before")} <= set(steps)

        @flow
        def commit() -> None:
            with working_in(Workshop(settings, registry)):
                manifest = commit_version(request, prepared, built).manifest
            for _ in range(2):
                with working_in(Workshop(settings, registry)):
                    record_trials(registry.of(manifest), outcome)
            with working_in(Workshop(settings, registry)):
                measured = examine(MeasurementExam(), registry.of(manifest).variant("int8"))
                evaluated = examine(AnswersExam(evaluation), registry.of(manifest).variant("int8"))
            chosen = _of(outcome, outcome.chosen["int8"]).candidate
            assert chosen is not None
            assert measured.metrics["ttft_ms"] == chosen.ttft_ms
            assert evaluated.kl_divergence == chosen.kl_divergence
            assert last_search(registry.of(manifest)) == outcome
            assert len(list(evidence(registry, manifest, "search"))) == 1
            (record,) = evidence(registry, manifest, "evaluation")
            assert record["precision"] == "int8"

        commit()

    def test_a_recipe_that_cannot_be_built_or_run_does_not_end_the_search(
        self, prefect: None, prepared: PreparedCheckpoint, small_settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def recipe(name: str, **options: Any) -> Recipe:
            builder = {"type": "ModelBuilder", "precision": "int4", **options}
            return Recipe(id=f"cpu-{name}", precision="int4", execution_provider="cpu", passes={"builder": builder})

        recipes = [recipe("int4", nodes_to_exclude=7), recipe("int4-fine", block_size=64)]
        monkeypatch.setattr("slmops.tasks.build.search.plan_search", lambda request: recipes)
        registry = open_registry(small_settings)
        evaluation = EvaluationSet(rows=chat_prompts()[:1], origin="a prompt")

        @flow
        def search() -> tuple[list[BuiltVariant], SearchOutcome]:
            request = _request(precisions=["int4"])
            with working_in(Workshop(small_settings, registry, TORCH_PROCESS)):
                return search_recipes(request, prepared, evaluation)

        built, outcome = search()
        assert outcome.chosen == {"int4": "int4-fine"}
        assert [built_variant.variant.recipe for built_variant in built] == ["cpu-int4-fine"]
        failed = _of(outcome, "int4")
        assert "Olive could not build" in str(failed.error)
        assert failed.candidate is None

        def no_measure(*arguments: Any, **options: Any) -> None:
            raise StageFailed("It does not run.")

        monkeypatch.setattr("slmops.tasks.build.search.examine", no_measure)
        built, outcome = search()
        assert built == []
        assert set(outcome.failures) == {"int4"}
        assert outcome.trials[1].error == "It does not run."

    def test_a_model_that_is_built_already_has_no_recipe_to_search(
        self, prepared: PreparedCheckpoint, small_settings: Settings, tmp_path: Path
    ) -> None:
        folder = build_genai_model(prepared.folder, tmp_path / "model", "int4")
        taken = prepared.model_copy(update={"inspection": inspect_checkpoint(folder)})
        evaluation = EvaluationSet(rows=chat_prompts()[:1], origin="a prompt")
        shop = Workshop(small_settings, open_registry(small_settings))
        with working_in(shop), pytest.raises(BadInput, check=coded("checkpoint-is-built")):
            search_recipes(_request(), taken, evaluation)
