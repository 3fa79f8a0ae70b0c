"""What `deploy` and `regate` share: from a stored version to variants that are judged, registered and proven."""

from dataclasses import dataclass

from prefect import State
from prefect.states import Completed, Failed

from infra.errors import SlmopsError, StageFailed
from infra.settings import Settings
from infra.storage.registry import Manifest, ModelRegistry, StoredVariant
from tasks.checkpoint import PreparedCheckpoint
from tasks.evaluate import (
    Evaluation,
    evaluate_stored_variant,
    forget_reference,
    known_evaluation,
    run_reference_once,
)
from tasks.evaluation_set import EvaluationSet
from tasks.gate import GateVerdict, judge_stored_variant, thresholds_for
from tasks.measure import measure_stored_variant
from tasks.register import last_proof, prove_variant, register_champion, register_variant, unregister_variant
from tasks.report.publish import publish_report
from tasks.report.records import DeployReport, VariantReport, in_order_of_size, overall_status, variant_metrics
from tasks.store import choose_champion, select_precision


class DeployEnded(SlmopsError):
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
    """One version on its way through measure, gate, register and prove."""

    manifest: Manifest
    evaluation: EvaluationSet
    gate: Gate
    description: str
    promote: bool
    registry: ModelRegistry
    settings: Settings


def qualify(
    version: Qualification,
    prepared: PreparedCheckpoint | None,
    failures: list[VariantReport],
    warnings: tuple[str, ...],
) -> DeployReport:
    """Measure, judge, register and prove every variant of a version, point the aliases, and publish the report.

    `prepared` is the source checkpoint; None where there is none (a model that came as ONNX) or none is needed.
    """
    manifest, registry, settings = version.manifest, version.registry, version.settings
    has_reference = manifest.source.parameters > 0
    if has_reference and prepared and not all(_evaluated(version, variant) for variant in manifest.variants):
        run_reference_once(prepared, version.evaluation, settings)
    outcomes = [_qualify_variant(version, variant, has_reference=has_reference) for variant in manifest.variants]
    forget_reference(manifest.source.digest, version.evaluation, settings)

    reports = in_order_of_size([*failures, *(outcome.report for outcome in outcomes)])
    passed = [one.precision for one in reports if one.status == "registered"]
    selected = select_precision(passed)
    champion_id = None
    if selected and choose_champion(registry, manifest, promote=version.promote):
        champion_id = register_champion(manifest, manifest.variant(selected), settings)
    report = DeployReport(
        name=manifest.name,
        version=manifest.version,
        status=overall_status(reports, unchanged=not any(outcome.changed for outcome in outcomes)),
        aliases=registry.aliases_of(manifest),
        variants=tuple(reports),
        checkpoint=manifest.source.origin,
        parameters=manifest.source.parameters,
        evaluation=version.evaluation.summary,
        reference_exact_match=next((one.evaluation.reference_exact_match for one in outcomes if one.evaluation), None),
        foundry_model_id=champion_id,
        foundry_dir=str(settings.foundry_dir),
        question=version.evaluation.rows[0].messages[-1].content,
        description=version.description,
        warnings=warnings,
    )
    return publish_report(report, registry, manifest, settings)


def _evaluated(version: Qualification, variant: StoredVariant) -> bool:
    found = known_evaluation(version.manifest, variant, version.evaluation, version.registry, version.settings)
    return found is not None


@dataclass(frozen=True)
class _Outcome:
    report: VariantReport
    changed: bool
    evaluation: Evaluation | None = None


def _qualify_variant(version: Qualification, variant: StoredVariant, *, has_reference: bool) -> _Outcome:
    manifest, registry, settings = version.manifest, version.registry, version.settings
    report = VariantReport(
        precision=variant.precision,
        status="failed",
        size_bytes=variant.size_bytes,
        uri=registry.uri(manifest, variant.precision),
        digest=variant.digest,
        recipe=variant.recipe,
    )
    evaluated: Evaluation | None = None
    try:
        measured = measure_stored_variant(manifest, variant, registry, settings)
        evaluated = evaluate_stored_variant(
            manifest, variant, version.evaluation, registry, settings, has_reference=has_reference
        )
        report = report.model_copy(update={"metrics": variant_metrics(measured, evaluated)})
        thresholds = thresholds_for(variant.precision, settings.gate, **vars(version.gate))
        verdict: GateVerdict = judge_stored_variant(manifest, variant, evaluated, thresholds, registry)
        report = report.model_copy(update={"gate": verdict})
        if not verdict.passed:
            removed = unregister_variant(manifest, variant, settings)
            return _Outcome(report.model_copy(update={"status": "rejected"}), bool(removed), evaluated)
        registration = register_variant(manifest, variant, version.description, registry, settings)
        row = version.evaluation.rows[0]
        proof = None if registration.changed else last_proof(manifest, variant, row, registry)
        is_new = proof is None
        if proof is None:
            proof = prove_variant(manifest, variant, row, evaluated.rows[0].answer, registry, settings)
    except StageFailed as error:
        return _Outcome(report.model_copy(update={"error": str(error)}), True, evaluated)
    update = {
        "status": "registered",
        "foundry_model_id": registration.model_id,
        "answer": proof.answer,
        "notes": (*verdict.notes, *registration.notes),
    }
    return _Outcome(report.model_copy(update=update), is_new, evaluated)


def ended(report: DeployReport) -> State[DeployReport]:
    """Return the flow run's final state for a report."""
    if report.status in ("registered", "unchanged"):
        return Completed(message=report.summary, data=report)
    name = "Rejected" if report.status == "rejected" else "Failed"
    return Failed(name=name, message=report.summary, data=DeployEnded(report))
