"""Climbing: if a precision's recipe misses the gate, the more faithful recipes that it names are tried in turn."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from slmops.infra.errors import StageFailed
from slmops.infra.records import Record
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.manifest import digest_of
from slmops.infra.storage.version import Version
from slmops.tasks.build.build import BuiltVariant
from slmops.tasks.build.recipes import Recipe, load_recipe
from slmops.tasks.build.search import Trial, copy_evidence, judged_by_answers, open_trials, trial_manifest
from slmops.tasks.build.variants import Built, build_each
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.answers import AnswersExam
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.exam import examine
from slmops.tasks.exams.source import ComparedExam, run_source_once
from slmops.tasks.exams.text import TextComparison, TextExam, TextSample
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop

Status = Literal["passed", "rejected", "failed"]
FIGURES = ("kl_divergence", "top1_agreement", "perplexity")


class Attempt(Record):
    """A recipe that was tried for a precision: its figures, and the missed checks of answers and distributions."""

    recipe: str
    status: Status
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)
    failed_checks: tuple[str, ...] = ()
    error: str | None = None


class Climb(Record):
    """The attempts of each precision, in order; the version has the last one that passed, else the closest."""

    attempts: dict[str, tuple[Attempt, ...]]


CLIMB = Kind("climb", Climb)


@dataclass(frozen=True)
class Climbed:
    """The final builds, the attempts, and the trials whose figures the version reuses."""

    built: Built
    climb: Climb
    trials: tuple[Trial, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The builds' warnings for the user, and one for each recipe that was replaced by its fallback."""
        of_fallbacks = (
            f"{attempts[0].recipe} could not be built and was replaced by {attempts[-1].recipe}: {attempts[0].error}"
            for attempts in self.climb.attempts.values()
            if attempts[0].status == "failed" and attempts[-1].status != "failed"
        )
        return (*self.built.warnings, *of_fallbacks)


def climb(
    built: Built,
    recipes: Sequence[Recipe],
    request: DeployRequest,
    prepared: PreparedCheckpoint,
    evaluation: EvaluationSet,
    text: TextSample | None = None,
) -> Climbed:
    """Try the next recipes of each precision whose variant misses the gate's checks of answers and distributions.

    The distributions are those on the evaluation rows, and on the user's text. `built` are the variants of the recipes.
    The variant of the first recipe that passes is kept, or, if none passes, the one closest to the checkpoint. If a
    recipe cannot be built, its fallback is built. A precision whose recipe names no others keeps its variant without a
    trial.
    """
    if built.search or prepared.inspection.kind == "genai":
        return Climbed(built, Climb(attempts={}))
    attempts: dict[str, tuple[Attempt, ...]] = {}
    variants, errors, trials = [], {**built.errors}, []
    first_of = {variant.variant.precision: variant for variant in built.variants}
    for recipe in recipes:
        precision, first = recipe.precision, first_of.get(recipe.precision)
        names = recipe.climbs_to if first and not request.no_climb else ()
        steps = [load_recipe(name, recipe.execution_provider) for name in names]
        if not steps and (first or not recipe.fallback):
            variants += [first] if first else []
            continue
        exams = _Exams(AnswersExam(evaluation), TextExam(text) if text else None)
        tried = list(_tried(_Step(recipe, first, errors.get(precision)), steps, request, prepared, exams))
        if recipe.fallback and not first:
            fallback = load_recipe(recipe.fallback, recipe.execution_provider)
            tried.append(_built_step(fallback, request, prepared, exams))
        attempts[precision] = tuple(step.attempt(request) for step in tried)
        kept = min((step for step in tried if step.built), key=_Step.distance, default=tried[-1])
        kept = tried[-1] if attempts[precision][-1].status == "passed" else kept
        if kept.built:
            variants.append(kept.built)
            trials.append(kept.trial())
            errors.pop(precision, None)
    return Climbed(replace(built, variants=variants, errors=errors), Climb(attempts=attempts), tuple(trials))


@stage("record climb", run_name="record-climb")
def record_climb(version: Version, climbed: Climbed) -> None:
    """Append the attempts to a version, and the figures of its variants under the keys of their exams."""
    for trial in climbed.trials:
        copy_evidence(version, trial)
    if climbed.climb.attempts:
        version.record(CLIMB, climbed.climb, digest_of(CLIMB.to_content(climbed.climb))[:16])


def last_climb(version: Version) -> Climb:
    """Return the attempts that a version's variants come from; empty without any climbing."""
    return version.latest(CLIMB) or Climb(attempts={})


@dataclass(frozen=True)
class _Exams:
    """The exams whose checks decide on the next step."""

    answers: AnswersExam
    text: TextExam | None


@dataclass
class _Step:
    """A recipe that was built, or failed with an error, and its answers to the exams."""

    recipe: Recipe
    built: BuiltVariant | None
    error: str | None = None
    evaluated: Evaluation | None = None
    text: TextComparison | None = None
    records: dict[str, str] = field(default_factory=dict)

    def evaluate(self, prepared: PreparedCheckpoint, exams: _Exams) -> None:
        """Compare the variant with its checkpoint, as a trial in the cache."""
        if self.built is None:
            return
        shop = workshop()
        (variant,) = open_trials(shop).of(trial_manifest(self.recipe.name, self.built.variant, prepared)).variants
        taken: list[ComparedExam[Any]] = [exams.answers, *([exams.text] if exams.text else [])]
        try:
            for exam in taken:
                if exam.needs_source([variant], shop.settings):
                    run_source_once(exam, prepared)
            self.evaluated = examine(exams.answers, variant)
            self.text = examine(exams.text, variant) if exams.text else None
        except StageFailed as error:
            self.error = str(error)
            return
        self.records = {exam.kind.name: exam.key(variant, shop.settings) for exam in taken}

    def missed(self, request: DeployRequest) -> list[str]:
        """Return the checks of answers and distributions that the variant does not pass."""
        if self.evaluated is None:
            return []
        verdict = judged_by_answers(self.evaluated, self.recipe.precision, request, workshop().settings, self.text)
        return list(dict.fromkeys(check.name for check in verdict.failed_checks))

    def distance(self) -> float:
        """Return the mean KL divergence from the checkpoint in nats; infinite for a variant that was not compared."""
        divergence = self.evaluated.kl_divergence if self.evaluated else None
        return math.inf if divergence is None else divergence

    def attempt(self, request: DeployRequest) -> Attempt:
        """Return the record of the attempt."""
        missed = self.missed(request)
        status: Status = "failed" if self.error else "rejected" if missed else "passed"
        evaluated = self.evaluated
        figures = {name: getattr(evaluated, name) for name in FIGURES} if evaluated else {}
        if evaluated and evaluated.score:
            figures["score"] = evaluated.score.value
        if evaluated and evaluated.quality_loss:
            figures["quality_loss"] = evaluated.quality_loss.value
        if self.text and self.text.kl_divergence:
            figures["text_kl_divergence"] = self.text.kl_divergence.value
        if self.built:
            figures["size_bytes"] = float(self.built.variant.size_bytes)
        return Attempt(
            recipe=self.recipe.name,
            status=status,
            metrics={name: value for name, value in figures.items() if value is not None},
            failed_checks=tuple(missed),
            error=self.error,
        )

    def trial(self) -> Trial:
        """Return the trial whose evidence is stored in the cache."""
        return Trial(recipe=self.recipe.name, precision=self.recipe.precision, chosen=True, records=self.records)


def _tried(
    first: _Step,
    steps: Sequence[Recipe],
    request: DeployRequest,
    prepared: PreparedCheckpoint,
    exams: _Exams,
) -> Iterator[_Step]:
    """Yield the steps up to the first one that misses no check."""
    first.evaluate(prepared, exams)
    yield first
    step = first
    for recipe in steps:
        if step.built and not step.missed(request):  # it passes, or it cannot be compared
            return
        step = _built_step(recipe, request, prepared, exams)
        yield step


def _built_step(recipe: Recipe, request: DeployRequest, prepared: PreparedCheckpoint, exams: _Exams) -> _Step:
    built = build_each(request, [recipe], prepared, exams.answers.evaluation)
    step = _Step(recipe, next(iter(built.variants), None), built.errors.get(recipe.precision))
    step.evaluate(prepared, exams)
    return step
