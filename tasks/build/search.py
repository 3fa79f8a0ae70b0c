"""The search: every recipe of a precision is built, measured and evaluated; the best one goes into the version."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, FiniteFloat

from slmops.infra.errors import StageFailed
from slmops.infra.process.call import OnProgress
from slmops.infra.records import Record
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, Source, StoredFile, StoredVariant, digest_of
from slmops.infra.storage.objects import Blob
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.build.build import BuiltVariant, build_variant
from slmops.tasks.build.calibration import Calibration, as_one, calibration_for
from slmops.tasks.build.planning import plan_search, refuse_recipes
from slmops.tasks.build.recipes import Recipe
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.answers import AnswersExam
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.exam import examine
from slmops.tasks.exams.measurement import Measurement, MeasurementExam
from slmops.tasks.exams.source import run_source_once
from slmops.tasks.exams.text import TextComparison
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.request.budget import Budget, parse_budget
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.verdict.choice import Judged, choose_variant
from slmops.tasks.verdict.gate import GateVerdict, judge
from slmops.tasks.verdict.pareto import Candidate, pareto_front
from slmops.tasks.verdict.thresholds import thresholds_for
from slmops.tasks.workshop import Workshop, working_with, workshop


class Trial(Record):
    """One recipe of a search, by its name (`int4-block128`).

    `candidate` has its figures (None if it failed before all were measured); `score` is its task score. Only trials
    that passed the gate's checks of answers and distributions are compared: those `on_front` are not dominated by
    another, and `dominated_by` names the trial that dominates. `reason` says why it was chosen or not. `records` are
    the keys of its evidence by kind.
    """

    recipe: str
    precision: str
    variant_digest: str | None = None
    build_s: FiniteFloat | None = None
    candidate: Candidate | None = None
    score: FiniteFloat | None = None
    passed_gate: bool | None = None
    on_front: bool = False
    dominated_by: str | None = None
    chosen: bool = False
    reason: str = ""
    error: str | None = None
    records: dict[str, str] = Field(default_factory=dict)


class SearchOutcome(Record):
    """All trials of a search, those of a precision together, its default recipe first."""

    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> dict[str, str]:
        """Precision -> name of the recipe in the version."""
        return {trial.precision: trial.recipe for trial in self.trials if trial.chosen}

    @property
    def failures(self) -> dict[str, str]:
        """Precision -> error, for each precision without any variant."""
        failed = {trial.precision: trial.error or "" for trial in reversed(self.trials)}
        return {precision: error for precision, error in failed.items() if precision not in self.chosen}


SEARCH = Kind("search", SearchOutcome)
Content = Kind[dict[str, Any]]  # a kind whose records are copied unchanged


class TrialRegistry(ModelRegistry):
    """A registry in the cache for a search's builds and results; files that the store already has are read there.

    Each trial is a version with one variant, which has its recipe's name in place of a precision, so that the stages
    can work on a trial and store their results.
    """

    def __init__(self, store: ModelRegistry, folder: Path) -> None:
        super().__init__(LocalObjectStore(folder))
        self._store = store

    def has_files(self, files: Iterable[StoredFile]) -> bool:
        """See `ModelRegistry.has_files`."""
        of_store, own = self._parted(files)
        return self._store.has_files(of_store) and super().has_files(own)

    def claim_files(self, files: Iterable[StoredFile]) -> list[Blob]:
        """See `ModelRegistry.claim_files`."""
        of_store, own = self._parted(files)
        return [*self._store.claim_files(of_store), *super().claim_files(own)]

    def materialize(self, files: Iterable[StoredFile], folder: Path, on_progress: OnProgress | None = None) -> None:
        """See `ModelRegistry.materialize`."""
        of_store, own = self._parted(files)
        self._store.materialize(of_store, folder, on_progress)
        super().materialize(own, folder, on_progress)

    def _parted(self, files: Iterable[StoredFile]) -> tuple[list[StoredFile], list[StoredFile]]:
        """Return the files that are in the store, and those that are only in the cache."""
        wanted = list(files)
        own = [file for file in wanted if super(TrialRegistry, self).has_files([file])]
        return [file for file in wanted if file not in own], own


def open_trials(shop: Workshop) -> TrialRegistry:
    """Return the registry of trials under the cache, which also reads the store."""
    return TrialRegistry(shop.registry, shop.settings.cache_dir / "trials")


def trial_manifest(name: str, variant: StoredVariant, prepared: PreparedCheckpoint) -> Manifest:
    """Return a trial's manifest in the registry of trials: equal files of one source are the same trial."""
    return _manifest_of(
        variant.model_copy(update={"precision": name}),
        Source(
            digest=prepared.digest,
            origin="",
            architecture=prepared.inspection.architecture,
            parameters=prepared.inspection.parameters,
        ),
    )


def _manifest_of(variant: StoredVariant, source: Source) -> Manifest:
    address = digest_of({"variant": variant.digest, "source": source.digest, "recipe": variant.precision})
    return Manifest(
        name=f"trial-{address[:32]}", version=1, source=source, builder={}, variants=(variant,), created_at=""
    )


def search_recipes(
    request: DeployRequest,
    prepared: PreparedCheckpoint,
    evaluation: EvaluationSet,
) -> tuple[list[BuiltVariant], SearchOutcome]:
    """Try every recipe of each requested precision; return the chosen variants, stored, and the outcome.

    Results of an earlier search for the same question are reused. A recipe that fails is reported in the outcome, and
    the others continue; a precision without a working recipe is missing from the variants. Raises `BadInput` for a
    checkpoint that already is an ONNX model, and as `plan_search` does. The reference's answers are kept for the
    version (see `slmops.tasks.exams.source.sources_in_use`).
    """
    if prepared.inspection.kind == "genai":
        refuse_recipes(request)
    shop = workshop()
    settings, trials = shop.settings, open_trials(shop)
    exams = MeasurementExam(), AnswersExam(evaluation)
    found = [_Tried(recipe, exams) for recipe in plan_search(request)]
    calibration = None
    try:
        calibration = calibration_for([tried.recipe for tried in found], request, prepared, evaluation.rows)
    except StageFailed as error:  # others can be built without
        for tried in found:
            tried.error = str(error) if tried.recipe.is_calibrated else None
    with working_with(trials):
        for tried in found:
            if tried.error is None:
                tried.build(prepared, request, calibration)
    answers = AnswersExam(evaluation)
    if answers.needs_source([tried.variant for tried in found if tried.variant], settings):
        run_source_once(answers, prepared)
    for tried in found:
        tried.take_exams()
    outcome = choose_recipes([tried.trial(request, settings) for tried in found], _scores(found), request)
    chosen = set(outcome.chosen.values())
    built = [tried.built for tried in found if tried.built and tried.recipe.name in chosen]
    for variant in built:
        keep_variant(variant.variant)
    return built, outcome


class _Tried:
    """A recipe during a search."""

    def __init__(self, recipe: Recipe, exams: tuple[MeasurementExam, AnswersExam]) -> None:
        self.recipe = recipe
        self.exams = exams
        self.built: BuiltVariant | None = None
        self.variant: Variant | None = None
        self.measured: Measurement | None = None
        self.evaluated: Evaluation | None = None
        self.error: str | None = None

    def build(self, prepared: PreparedCheckpoint, request: DeployRequest, calibration: Calibration | None) -> None:
        """Build it into the current registry."""
        try:
            self.built = build_variant(self.recipe, prepared, request, as_one(calibration))
        except StageFailed as error:
            self.error = str(error)
            return
        manifest = trial_manifest(self.recipe.name, self.built.variant, prepared)
        (self.variant,) = workshop().registry.of(manifest).variants

    def take_exams(self) -> None:
        """Measure and evaluate the recipe if it could be built."""
        if self.variant is None:
            return
        measurement, answers = self.exams
        try:
            self.measured = examine(measurement, self.variant)
            self.evaluated = examine(answers, self.variant)
        except StageFailed as error:
            self.error = str(error)

    def trial(self, request: DeployRequest, settings: Settings) -> Trial:
        """Return the record of the results, before the choice."""
        trial = Trial(recipe=self.recipe.name, precision=self.recipe.precision, error=self.error)
        if self.built:
            update = {"variant_digest": self.built.variant.digest, "build_s": self.built.wall_s}
            trial = trial.model_copy(update=update)
        if not (self.variant and self.measured and self.evaluated):
            return trial.model_copy(update={"reason": "it failed"})
        variant = self.variant
        return trial.model_copy(
            update={
                "candidate": candidate_of(self.recipe.name, self.measured, self.evaluated),
                "score": _score_of(self.evaluated),
                "passed_gate": judged_by_answers(self.evaluated, self.recipe.precision, request, settings).passed,
                "records": {exam.kind.name: exam.key(variant, settings) for exam in self.exams},
            }
        )


def candidate_of(name: str, measured: Measurement, evaluated: Evaluation) -> Candidate:
    """Return a variant's figures for the comparison."""
    metrics = measured.metrics
    return Candidate(
        name=name,
        size_bytes=int(metrics["size_bytes"]),
        peak_rss_bytes=int(metrics["peak_rss_bytes"]),
        ttft_ms=metrics["ttft_ms"],
        token_generation_throughput_tps=metrics["token_generation_throughput_tps"],
        quality_loss=evaluated.quality_loss.value if evaluated.quality_loss else None,
        kl_divergence=evaluated.kl_divergence,
        reliable=measured.reliable,
    )


def _score_of(evaluated: Evaluation) -> float | None:
    return evaluated.score.value if evaluated.score else None


def _scores(found: Sequence[_Tried]) -> dict[str, tuple[float, ...]]:
    """Return recipe -> score of each row that has one; the rows of all trials are the same."""
    return {
        trial.recipe.name: tuple(row.score for row in trial.evaluated.rows if row.score is not None)
        for trial in found
        if trial.evaluated
    }


def judged_by_answers(
    evaluated: Evaluation,
    precision: str,
    request: DeployRequest,
    settings: Settings,
    text: TextComparison | None = None,
) -> GateVerdict:
    """Return the gate's verdict on answers and distributions alone, those of the rows and those of the user's text."""
    return judge(evaluated, thresholds_for(precision, settings.gate), text=text, allow=request.allow)


def choose_recipes(
    trials: Sequence[Trial], scores: dict[str, tuple[float, ...]], request: DeployRequest
) -> SearchOutcome:
    """Choose one recipe per precision, by name; `scores` are each recipe's scores row by row, empty without any.

    The choice is that of `choose_variant` among the recipes that pass the gate, and the budget if any is within it: it
    drops dominated ones, then those whose quality is measurably below the best one's, and takes the fastest in token
    generation, among equally fast ones the smallest. If none passes the gate, all that ran are compared, so that the
    version's own gate reports the faults of the best one.
    """
    budget = parse_budget(request.budget) or Budget()
    decided: dict[str, Trial] = {}
    for precision in dict.fromkeys(trial.precision for trial in trials):
        ran = [trial for trial in trials if trial.precision == precision and trial.candidate]
        compared = [trial for trial in ran if trial.passed_gate] or ran
        judged = [
            Judged(candidate=trial.candidate, scores=scores.get(trial.recipe) or None)
            for trial in compared
            if trial.candidate
        ]
        choice = choose_variant(judged, budget)
        if choice.selected is None:  # none is within the budget: the choice between the precisions reports that
            choice = choose_variant(judged, Budget())
        front = pareto_front([variant.candidate for variant in judged])
        others = len([point for point in front.values() if point is None]) - 1
        for trial in ran:
            name = trial.recipe
            reason = choice.reasons.get(name, "it does not pass the gate")
            if name == choice.selected:
                reason = _why(others, len(ran))
            update = {
                "on_front": name in front and front[name] is None,
                "dominated_by": front.get(name),
                "chosen": name == choice.selected,
                "reason": reason,
            }
            decided[name] = trial.model_copy(update=update)
    return SearchOutcome(trials=tuple(decided.get(trial.recipe, trial) for trial in trials))


def _why(others_on_front: int, ran: int) -> str:
    if ran == 1:
        return "the only recipe of its precision that ran"
    if others_on_front == 0:
        return "no other recipe of its precision is better in any figure"
    return (
        f"of {others_on_front + 1} recipes that no other dominates, the fastest of those whose quality is not "
        "measurably below the best"
    )


@stage("keep variant", run_name="keep-{variant.recipe}")
def keep_variant(variant: StoredVariant) -> None:
    """Copy the files of a chosen trial into the store."""
    shop = workshop()
    registry = shop.registry
    with stage_progress(f"keep {variant.precision}") as on_progress:
        if not registry.claim_files(variant.files):
            return
        with work_folder(shop.settings) as work:
            open_trials(shop).materialize(variant.files, work / "model")
            registry.add_files(work / "model", on_progress)


@stage("record search", run_name="record-search")
def record_trials(version: Version, outcome: SearchOutcome) -> None:
    """Append the outcome to a version, and its variants' figures under the keys of their exams."""
    for trial in outcome.trials:
        if trial.chosen:
            copy_evidence(version, trial)
    version.record(SEARCH, outcome, digest_of(SEARCH.to_content(outcome))[:16])


def copy_evidence(version: Version, trial: Trial) -> None:
    """Record a chosen trial's figures in a version that has none, under the keys of their exams."""
    for kind, key, content in _recorded(trial, version.manifest, open_trials(workshop())):
        if version.latest(kind, key) is None:
            version.record(kind, content, key)


def last_search(version: Version) -> SearchOutcome | None:
    """Return the outcome of the search that a version's variants come from, None if there was no search."""
    return version.latest(SEARCH)


def _recorded(trial: Trial, manifest: Manifest, trials: TrialRegistry) -> Iterator[tuple[Content, str, dict[str, Any]]]:
    variant = manifest.variant(trial.precision)
    source = manifest.source.model_copy(update={"origin": ""})
    of_trial = _manifest_of(variant.model_copy(update={"precision": trial.recipe}), source)
    for name, key in trial.records.items():
        kind = Content(name, dict)
        content = trials.of(of_trial).latest(kind, key)
        if content is not None:
            if "precision" in content:
                content["precision"] = trial.precision
            yield kind, key, content
