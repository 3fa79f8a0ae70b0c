"""What `deploy` and `regate` share: from a stored version to variants that are judged, registered, proven, chosen."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefect import State
from prefect.states import Completed, Failed

from slmops.flows.endings import RunEnded
from slmops.flows.variants import Examined, measure_on_workers
from slmops.infra.errors import StageFailed
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import Manifest, StoredVariant
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.answers import (
    Evaluation,
    evaluate_stored_variant,
    needs_reference,
    reference_in_use,
    run_reference_once,
)
from slmops.tasks.exams.endurance import exercise_stored_variant
from slmops.tasks.exams.length_sweep import steadiness_of
from slmops.tasks.exams.measurement import measure_stored_variant
from slmops.tasks.exams.template_parity import check_template_parity, needs_parity
from slmops.tasks.exams.text import (
    TextSample,
    compare_stored_variant_on_text,
    needs_text_reference,
    run_text_reference_once,
    text_reference_in_use,
)
from slmops.tasks.foundry.registration import (
    foundry_model_id,
    last_proof,
    prove_variant,
    register_variant,
    unregister_variant,
)
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
    `torch_child` is where the checkpoint and its tokenizer are run (`slmops.tasks.build.build.torch_process`).
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
    torch_child: ChildProcess

    @property
    def has_reference(self) -> bool:
        """Whether the version was built from a checkpoint that its variants are compared with."""
        return self.manifest.source.parameters > 0


def qualify(version: Qualification, failures: Sequence[VariantReport], warnings: tuple[str, ...]) -> DeployReport:
    """Qualify every variant of a version, choose the one that serves, point the aliases, and publish the report."""
    with version.registry.in_use(version.manifest), references_in_use(version):
        return _qualify(version, failures, warnings)


def _qualify(version: Qualification, failures: Sequence[VariantReport], warnings: tuple[str, ...]) -> DeployReport:
    manifest, registry, settings = version.manifest, version.registry, version.settings
    run_references(version)
    elsewhere = measure_on_workers(manifest, version.evaluation.rows, registry, settings)
    outcomes = [_qualify_variant(version, variant, elsewhere.get(variant.precision)) for variant in manifest.variants]

    passed = [judged(one.report) for one in outcomes if one.report.status == "registered"]
    choice = choose_variant(passed, parse_budget(version.budget))
    record_choice(registry.of(manifest), choice, version.budget)
    standing = Standing()
    if choice.selected:
        chosen = manifest.variant(choice.selected)
        standing = settle_champion(manifest, chosen, registry, settings, promote=version.promote)
    variants = with_reasons(in_order_of_size([*failures, *(one.report for one in outcomes)]), choice)
    report = DeployReport(
        name=manifest.name,
        version=manifest.version,
        status=overall_status(variants, choice, unchanged=not any(outcome.changed for outcome in outcomes)),
        aliases=registry.aliases_of(manifest),
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
        history=history_of(registry.of(manifest), settings.threads),
        search=last_search(manifest, registry),
    )
    report = publish_report(report, registry.of(manifest), settings)
    if standing.refusal:
        raise standing.refusal
    return report


def needs_source(
    manifest: Manifest,
    evaluation: EvaluationSet,
    text: TextSample | None,
    registry: ModelRegistry,
    settings: Settings,
) -> bool:
    """Whether some variant has yet to be compared with the source checkpoint."""
    return (
        needs_reference(manifest, evaluation, registry, settings)
        or (text is not None and needs_text_reference(manifest, text, registry, settings))
        or needs_parity(manifest, registry)
    )


def run_references(version: Qualification) -> None:
    """Run the source checkpoint on what some variant has yet to be compared on."""
    manifest, prepared, registry, settings = version.manifest, version.prepared, version.registry, version.settings
    if prepared is None:
        return
    if needs_reference(manifest, version.evaluation, registry, settings):
        run_reference_once(prepared, version.evaluation, settings, version.torch_child)
    if version.text and needs_text_reference(manifest, version.text, registry, settings):
        run_text_reference_once(prepared, version.text, settings, version.torch_child)


@contextlib.contextmanager
def references_in_use(version: Qualification) -> Iterator[None]:
    """Keep the reference's logits, which other deploys of the checkpoint share; they are large, and go at the end."""
    digest = version.manifest.source.digest
    with contextlib.ExitStack() as stack:
        stack.enter_context(reference_in_use(digest, version.evaluation, version.settings))
        if version.text:
            stack.enter_context(text_reference_in_use(digest, version.text, version.settings))
        yield


@dataclass(frozen=True)
class _Outcome:
    report: VariantReport
    changed: bool


def _qualify_variant(version: Qualification, variant: StoredVariant, elsewhere: Examined | None) -> _Outcome:
    manifest, registry, settings = version.manifest, version.registry, version.settings
    report = VariantReport(
        precision=variant.precision,
        status="failed",
        size_bytes=variant.size_bytes,
        uri=registry.uri(manifest, variant.precision),
        digest=variant.digest,
        recipe=variant.recipe,
    )
    try:
        evaluated = evaluate_stored_variant(
            manifest, variant, version.evaluation, registry, settings, has_reference=version.has_reference
        )
        details = examine(version, variant, evaluated, elsewhere)
        figures = {"metrics": variant_metrics(details), "intervals": variant_intervals(details)}
        report = report.model_copy(update={"details": details, **figures})
        thresholds = thresholds_for(variant.precision, settings.gate, **vars(version.gate))
        verdict: GateVerdict = judge_stored_variant(
            registry.of(manifest).variant(variant.precision),
            evaluated,
            thresholds,
            steadiness=details.steadiness,
            parity=details.parity,
            text=details.text,
            exercises=details.exercises,
        )
        report = report.model_copy(update={"gate": verdict})
        if not verdict.passed:
            removed = unregister_variant(manifest, variant, settings)
            return _Outcome(report.model_copy(update={"status": "rejected"}), bool(removed))
        model_id = foundry_model_id(manifest.name, variant.precision, variant.device, manifest.version)
        report = report.model_copy(update={"foundry_model_id": model_id})
        card = model_card(
            manifest,
            report,
            evaluation=version.evaluation.summary,
            description=version.description,
            base_model=base_model_of(manifest.source.origin),
        )
        registration = register_variant(manifest, variant, version.description, card, registry, settings)
        row, answer = version.evaluation.rows[0], evaluated.rows[0].answer
        proof = None if registration.changed else last_proof(manifest, variant, row, registry)
        is_new = proof is None
        if proof is None:
            proof = prove_variant(manifest, variant, row, answer, registry, settings)
    except StageFailed as error:
        return _Outcome(report.model_copy(update={"error": str(error), "foundry_model_id": None}), True)
    update = {
        "status": "registered",
        "answer": proof.answer,
        "notes": (*verdict.notes, *registration.notes, *proof.notes),
    }
    return _Outcome(report.model_copy(update=update), is_new)


def examine(
    version: Qualification, variant: StoredVariant, evaluated: Evaluation, elsewhere: Examined | None = None
) -> VariantDetails:
    """Measure a variant in every way that the gate judges; what is on record is not measured again.

    What a worker has measured `elsewhere` is taken as it is. Raises `StageFailed` where that failed.

    A variant with another vocabulary is not its checkpoint's, and nothing else of it matters.
    """
    if not evaluated.vocabulary.comparable:
        return VariantDetails(evaluation=evaluated)
    manifest, registry, settings = version.manifest, version.registry, version.settings
    rows = version.evaluation.rows
    measured = elsewhere.measured if elsewhere else measure_stored_variant(manifest, variant, registry, settings)
    exercises = (
        elsewhere.exercises
        if elsewhere
        else (
            exercise_stored_variant(manifest, variant, rows, "genai", registry, settings),
            exercise_stored_variant(manifest, variant, rows, "foundry", registry, settings),
        )
    )
    checkpoint = version.prepared.folder if version.has_reference and version.prepared else None
    return VariantDetails(
        measurement=measured,
        evaluation=evaluated,
        steadiness=steadiness_of(measured),
        parity=check_template_parity(manifest, variant, checkpoint, registry, settings, version.torch_child),
        text=compare_stored_variant_on_text(
            manifest, variant, version.text, registry, settings, has_reference=version.has_reference
        )
        if version.text
        else None,
        exercises=exercises,
    )


def ended(report: DeployReport) -> State[DeployReport]:
    """Return the flow run's final state for a report."""
    if report.status in ("registered", "unchanged"):
        return Completed(message=report.summary, data=report)
    name = "Rejected" if report.status == "rejected" else "Failed"
    return Failed(name=name, message=report.summary, data=DeployEnded(report))
