"""Climbing: more faithful recipes are tried where the gate rejects, within bounds, and each attempt is reported."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from slmops.infra.errors import StageFailed
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import CalibrationSettings, EvaluationSettings, MachineSettings, Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.build.climbing import Climbed, climb, last_climb, record_climb
from slmops.tasks.build.planning import plan_recipes
from slmops.tasks.build.recipes import known_recipes, load_recipe
from slmops.tasks.build.variants import build_each
from slmops.tasks.checkpoint.inspection import content_digest, inspect_checkpoint
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.answers import AnswersExam
from slmops.tasks.exams.exam import examine
from slmops.tasks.exams.source import sources_in_use
from slmops.tasks.exams.text import TextSample
from slmops.tasks.plan import parse_request
from slmops.tasks.questions.evaluation_set import EvaluationSet, chat_prompts
from slmops.tasks.report.attempts import attempts_text, nearest_of
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.request.gate_limits import with_limits
from slmops.tasks.versions.commit import commit_version
from slmops.tasks.workshop import Workshop, torch_process, working_in
from tests.support.checkpoints import make_tiny_checkpoint

pytestmark = pytest.mark.runtime

EVALUATION = EvaluationSet(rows=chat_prompts()[:2], origin="two prompts")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    settings = Settings(
        home=tmp_path_factory.mktemp("climbing") / "home",
        machine=MachineSettings(threads=1),
        evaluation=EvaluationSettings(max_new_tokens=8, max_positions=64),
        calibration=CalibrationSettings(max_tokens=400, max_new_tokens=8),
    )
    with prefect_test_harness(), torch_process(settings) as child:
        yield Workshop(settings, open_registry(settings), child)


def prepare(folder: Path) -> PreparedCheckpoint:
    return PreparedCheckpoint(
        uri=folder.as_uri(), origin=str(folder), digest=content_digest(folder), inspection=inspect_checkpoint(folder)
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedCheckpoint:
    return prepare(make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "checkpoint", hidden_size=128))


def request(**parameters: object) -> DeployRequest:
    return parse_request({"checkpoint": "here", "name": "home", "precisions": ["int4"], **parameters})


def climbed(
    shop: Workshop, prepared: PreparedCheckpoint, asked: DeployRequest, text: TextSample | None = None
) -> Climbed:
    @flow
    def run() -> Climbed:
        limited = replace(shop, settings=with_limits(shop.settings, vars(asked)))
        with working_in(limited), sources_in_use([AnswersExam(EVALUATION)], prepared.digest):
            recipes = plan_recipes(asked)
            return climb(build_each(asked, recipes, prepared, EVALUATION), recipes, asked, prepared, EVALUATION, text)

    return run()


def recipes_of(found: Climbed) -> list[str]:
    return [variant.variant.recipe.removeprefix("cpu-") for variant in found.built.variants]


def test_every_recipe_climbs_to_known_ones_of_its_precision() -> None:
    named = {name: load_recipe(name) for precision in ("fp16", "int8", "int4") for name in known_recipes(precision)}
    for recipe in named.values():
        for other in (*recipe.climbs_to, *([recipe.fallback] if recipe.fallback else [])):
            assert named[other].precision == recipe.precision
            assert other != recipe.name
    assert named["int4"].climbs_to == ("int4-mixed",)
    assert not named["int4-rtn"].is_calibrated


def test_it_goes_on_to_the_next_recipe_until_one_passes(shop: Workshop, prepared: PreparedCheckpoint) -> None:
    impossible = {"max_kl_divergence": 0.0, "min_top1_agreement": 0.0}
    nothing = climbed(shop, prepared, request(**impossible))
    first, second = nothing.climb.attempts["int4"]
    assert (first.recipe, first.status, second.recipe, second.status) == ("int4", "rejected", "int4-mixed", "rejected")
    assert first.failed_checks == ("kl_divergence",)
    assert 0 < second.metrics["kl_divergence"] < first.metrics["kl_divergence"]
    assert second.metrics["size_bytes"] > first.metrics["size_bytes"]
    assert recipes_of(nothing) == ["int4-mixed"]
    assert nearest_of(nothing.climb.attempts["int4"], "int4") == "int4-mixed"
    assert attempts_text(nothing.climb.attempts["int4"]).startswith("int4 rejected (KL divergence ")

    between = (first.metrics["kl_divergence"] + second.metrics["kl_divergence"]) / 2
    reached = climbed(shop, prepared, request(max_kl_divergence=between, min_top1_agreement=0.0))
    assert [attempt.status for attempt in reached.climb.attempts["int4"]] == ["rejected", "passed"]
    assert recipes_of(reached) == ["int4-mixed"]

    at_once = climbed(shop, prepared, request(max_kl_divergence=9.0, min_top1_agreement=0.0))
    assert [(attempt.recipe, attempt.status) for attempt in at_once.climb.attempts["int4"]] == [("int4", "passed")]
    assert recipes_of(at_once) == ["int4"]

    for stopped in (request(no_climb=True, **impossible), request(recipes=["int4-rtn"], **impossible)):
        kept = climbed(shop, prepared, stopped)
        assert kept.climb.attempts == {}
        assert recipes_of(kept) == [plan_recipes(stopped)[0].name]


def test_it_goes_on_where_only_the_users_text_is_missed(shop: Workshop, prepared: PreparedCheckpoint) -> None:
    text = TextSample(origin="a.txt", text="The lights in the kitchen are on. " * 4, digest="0" * 64)
    asked = request(max_kl_divergence=0.0, min_top1_agreement=0.0, allow=["kl_divergence"])
    first, second = climbed(shop, prepared, asked, text).climb.attempts["int4"]
    assert first.failed_checks == second.failed_checks == ("text_kl_divergence",)
    assert (first.recipe, second.recipe) == ("int4", "int4-mixed")
    # Which of the two is nearer on so short a text is chance in a model of random weights.
    assert 0 < first.metrics["text_kl_divergence"] != second.metrics["text_kl_divergence"] > 0


def test_a_version_keeps_the_attempts_and_does_not_repeat_them(
    shop: Workshop, prepared: PreparedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(max_kl_divergence=9.0, min_top1_agreement=0.0)
    found = climbed(shop, prepared, asked)

    def no_child(*arguments: object, **options: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(ChildProcess, "run", no_child)

    @flow
    def commit() -> None:
        with working_in(replace(shop, torch_child=None)):
            version = commit_version(asked, prepared, found.built.variants)
            record_climb(version, found)
            record_climb(version, found)
            assert last_climb(version) == found.climb
            evaluated = examine(AnswersExam(EVALUATION), version.variant("int4"))
            (attempt,) = found.climb.attempts["int4"]
            assert evaluated.kl_divergence == attempt.metrics["kl_divergence"]

    commit()


def test_where_no_calibrated_recipe_can_be_built_the_fallback_is(shop: Workshop, tmp_path: Path) -> None:
    """The groups of Olive's format have 32 columns: 80 do not fill them."""
    odd = prepare(make_tiny_checkpoint(tmp_path / "odd", "llama", intermediate_size=80))
    found = climbed(shop, odd, request(max_kl_divergence=9.0, min_top1_agreement=0.0))
    assert [attempt.recipe for attempt in found.climb.attempts["int4"]] == ["int4", "int4-rtn"]
    assert recipes_of(found) == ["int4-rtn"]
    assert found.built.errors == {}
    (warning,) = found.warnings
    assert "replaced by int4-rtn" in warning
    assert "divisible" in warning


def test_a_checkpoint_that_cannot_be_calibrated_is_rounded_to_nearest(
    shop: Workshop, prepared: PreparedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise StageFailed("It answers nothing.")

    monkeypatch.setattr("slmops.tasks.build.calibration.calibrate_once", fail)
    found = climbed(shop, prepared, request(max_kl_divergence=9.0, min_top1_agreement=0.0))
    first, second = found.climb.attempts["int4"]
    assert (first.status, first.error) == ("failed", "It answers nothing.")
    assert (second.recipe, second.status) == ("int4-rtn", "passed")
    assert recipes_of(found) == ["int4-rtn"]
