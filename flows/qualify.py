"""What `deploy` and `regate` share: from a stored version to variants that are judged, registered, proven, chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect import State
from prefect.states import Completed, Failed

from slmops.flows.endings import RunEnded
from slmops.flows.variants import Examined, measure_on_workers
from slmops.infra.errors import StageFailed
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.version import Variant
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.answers import (
    AnswersExam,
    Evaluation,
)
from slmops.tasks.exams.endurance import EnduranceExam
from slmops.tasks.exams.exam import examine
from slmops.tasks.exams.length_sweep import steadiness_of
from slmops.tasks.exams.measurement import MeasurementExam
from slmops.tasks.exams.source import ComparedExam, run_source_once, sources_in_use
from slmops.tasks.exams.template_parity import ParityExam, needs_parity
from slmops.tasks.exams.text import (
    TextExam,
    TextSample,
)
from slmops.tasks.foundry.ids import model_id_of
from slmops.tasks.foundry.proof import last_proof, prove_variant
from slmops.tasks.foundry.registration import register_variant, unregister_variant
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.report.assemble import (
    in_order_of_size,
    judged,
    overall_status,
    provenance_of,
    reference_scores,
    variant_intervals,
    variant_metrics,
    with_reasons,
)
from slmops.tasks.report.model_card import base_model_of, model_card
from slmops.tasks.report.publish import publish_report
from slmops.tasks.report.records import DeployReport, VariantDetails, VariantReport
from slmops.tasks.request.budget import parse_budget
from slmops.tasks.verdict.choice import choose_variant
from slmops.tasks.verdict.gate import GateVerdict, judge_stored_variant, thresholds_for
from slmops.tasks.verdict.history import history_of
from slmops.tasks.verdict.search import last_search
from slmops.tasks.versions.champion import Standing, settle_champion
from slmops.tasks.versions.commit import record_choice
from slmops.tasks.workshop import workshop


class DeployEnded(RunEnded):
    """A run that ended with a failed variant, or without one to serve; `report` says what there is."""

    def __init__(self, report: DeployReport) -> None:
        super().__init__(report.summary, "The report names each variant's figures and failures.")
        self.report = report
        self.exit_code = 3 if report.status == "rejected" else 1


@dataclass(frozen=True)
class Gate:
    """Thresholds of one run, each None where the settings' or the precision's own holds."""

    min_top1_agreement: float | None = None
    max_kl_divergence: float | None = None
    max_quality_loss: float | None = None


@dataclass(frozen=True)
class Qualification:
    """One version on its way through measure, gate, register, prove and choice.

    `prepared` is the source checkpoint; None where there is none (a model that came as ONNX) or none is needed.
    """

    manifest: Manifest
    prepared: PreparedCheckpoint | None
    evaluation: EvaluationSet
    text: TextSample | None
    gate: Gate
    budget: Sequence[str]
    description: str
    promote: bool
    registry: ModelRegistry
    settings: Settings

    @property
    def has_reference(self) -> bool:
        """Whether the version was built from a checkpoint that its variants are compared with."""
        return self.manifest.source.parameters > 0


def qualify(version: Qualification, failures: Sequence[VariantReport], warnings: tuple[str, ...]) -> DeployReport:
    """Qualify every variant of a version, choose the one that serves, point the aliases, and publish the report."""
    exams = compared_exams(version.evaluation, version.text)
    with version.registry.in_use(version.manifest), sources_in_use(exams, version.manifest.source.digest):
        return _qualify(version, failures, warnings)


def _qualify(version: Qualification, failures: Sequence[VariantReport], warnings: tuple[str, ...]) -> DeployReport:
    manifest, registry, settings = version.manifest, version.registry, version.settings
    run_references(version)
    elsewhere = measure_on_workers(manifest, version.evaluation.rows, registry, settings)
    stored = registry.of(manifest)
    outcomes = [_qualify_variant(version, variant, elsewhere.get(variant.precision)) for variant in stored.variants]

    passed = [judged(one.report) for one in outcomes if one.report.status == "registered"]
    choice = choose_variant(passed, parse_budget(version.budget))
    record_choice(stored, choice, version.budget)
    standing = Standing()
    if choice.selected:
        standing = settle_champion(stored.variant(choice.selected), settings, promote=version.promote)
    variants = with_reasons(in_order_of_size([*failures, *(one.report for one in outcomes)]), choice)
    report = DeployReport(
        name=manifest.name,
        version=manifest.version,
        status=overall_status(variants, choice, unchanged=not any(outcome.changed for outcome in outcomes)),
        aliases=stored.aliases,
        selected=choice.selected,
        reason=choice.reason,
        budget=tuple(version.budget),
        variants=variants,
        checkpoint=manifest.source.origin,
        parameters=manifest.source.parameters,
        evaluation=version.evaluation.summary,
        evaluation_rows=version.evaluation.rows,
        **reference_scores(variants),
        foundry_model_id=standing.foundry_model_id,
        foundry_dir=str(settings.foundry_dir),
        question=version.evaluation.rows[0].messages[-1].content,
        description=version.description,
        warnings=(*warnings, *standing.warnings),
        provenance=provenance_of(manifest),
        history=history_of(stored, settings.threads),
        search=last_search(stored),
    )
    report = publish_report(report, stored, settings)
    if standing.refusal:
        raise standing.refusal
    return report


def needs_source(
    manifest: Manifest,
    evaluation: EvaluationSet,
    text: TextSample | None,
) -> bool:
    """Whether some variant has yet to be compared with the source checkpoint."""
    shop = workshop()
    variants = shop.registry.of(manifest).variants
    exams = compared_exams(evaluation, text)
    return any(exam.needs_source(variants, shop.settings) for exam in exams) or needs_parity(variants)


def compared_exams(evaluation: EvaluationSet, text: TextSample | None) -> list[ComparedExam[Any]]:
    """Return the exams that hold a variant beside its source checkpoint."""
    return [AnswersExam(evaluation), *([TextExam(text)] if text else [])]


def run_references(version: Qualification) -> None:
    """Run the source checkpoint on what some variant has yet to be compared on."""
    if version.prepared is None:
        return
    for exam in compared_exams(version.evaluation, version.text):
        if exam.needs_source(version.registry.of(version.manifest).variants, version.settings):
            run_source_once(exam, version.prepared)


@dataclass(frozen=True)
class _Outcome:
    report: VariantReport
    changed: bool


def _qualify_variant(version: Qualification, variant: Variant, elsewhere: Examined | None) -> _Outcome:
    manifest, settings = version.manifest, version.settings
    report = VariantReport(
        precision=variant.precision,
        status="failed",
        size_bytes=variant.size_bytes,
        uri=variant.uri,
        digest=variant.digest,
        recipe=variant.recipe,
    )
    try:
        evaluated = examine(AnswersExam(version.evaluation), variant)
        details = examined(version, variant, evaluated, elsewhere)
        figures = {"metrics": variant_metrics(details), "intervals": variant_intervals(details)}
        report = report.model_copy(update={"details": details, **figures})
        thresholds = thresholds_for(variant.precision, settings.gate, **vars(version.gate))
        verdict: GateVerdict = judge_stored_variant(
            variant,
            evaluated,
            thresholds,
            steadiness=details.steadiness,
            parity=details.parity,
            text=details.text,
            exercises=details.exercises,
        )
        report = report.model_copy(update={"gate": verdict})
        if not verdict.passed:
            removed = unregister_variant(variant, settings)
            return _Outcome(report.model_copy(update={"status": "rejected"}), bool(removed))
        report = report.model_copy(update={"foundry_model_id": model_id_of(variant)})
        card = model_card(
            manifest,
            report,
            evaluation=version.evaluation.summary,
            description=version.description,
            base_model=base_model_of(manifest.source.origin),
        )
        registration = register_variant(variant, version.description, card, settings)
        row, answer = version.evaluation.rows[0], evaluated.rows[0].answer
        proof = None if registration.changed else last_proof(variant, row)
        is_new = proof is None
        if proof is None:
            proof = prove_variant(variant, row, answer, settings)
    except StageFailed as error:
        return _Outcome(report.model_copy(update={"error": str(error), "foundry_model_id": None}), True)
    update = {
        "status": "registered",
        "answer": proof.answer,
        "notes": (*verdict.notes, *registration.notes, *proof.notes),
    }
    return _Outcome(report.model_copy(update=update), is_new)


def examined(
    version: Qualification, variant: Variant, evaluated: Evaluation, elsewhere: Examined | None = None
) -> VariantDetails:
    """Measure a variant in every way that the gate judges; what is on record is not measured again.

    What a worker has measured `elsewhere` is taken as it is. Raises `StageFailed` where that failed.

    A variant with another vocabulary is not its checkpoint's, and nothing else of it matters.
    """
    if not evaluated.vocabulary.comparable:
        return VariantDetails(evaluation=evaluated)
    rows = version.evaluation.rows
    measured = elsewhere.measured if elsewhere else examine(MeasurementExam(), variant)
    exercises = (
        elsewhere.exercises
        if elsewhere
        else (
            examine(EnduranceExam("genai", rows), variant),
            examine(EnduranceExam("foundry", rows), variant),
        )
    )
    checkpoint = version.prepared.folder if version.has_reference and version.prepared else None
    return VariantDetails(
        measurement=measured,
        evaluation=evaluated,
        steadiness=steadiness_of(measured),
        parity=examine(ParityExam(checkpoint), variant),
        text=examine(TextExam(version.text), variant) if version.text else None,
        exercises=exercises,
    )


def ended(report: DeployReport) -> State[DeployReport]:
    """Return the flow run's final state for a report."""
    if report.status in ("registered", "unchanged"):
        return Completed(message=report.summary, data=report)
    name = "Rejected" if report.status == "rejected" else "Failed"
    return Failed(name=name, message=report.summary, data=DeployEnded(report))
