"""The qualification of a version: each variant is examined, judged, registered and proven."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.infra.errors import StageFailed
from slmops.infra.storage.evidence import LICENSE
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.build.climbing import last_climb
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.answers import AnswersExam
from slmops.tasks.exams.constraint import ConstraintExam
from slmops.tasks.exams.endurance import endurance_exams
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.exam import examine
from slmops.tasks.exams.length_sweep import length_sweep_of
from slmops.tasks.exams.measurement import MeasurementExam
from slmops.tasks.exams.on_workers import Examined, answered, answered_together
from slmops.tasks.exams.source import ComparedExam, run_source_once
from slmops.tasks.exams.source_lengths import SourceLengthsExam, needs_source_at_lengths
from slmops.tasks.exams.statements import Statement
from slmops.tasks.exams.template_parity import ParityExam, needs_parity
from slmops.tasks.exams.text import TextExam, TextSample
from slmops.tasks.foundry.ids import model_id_of
from slmops.tasks.foundry.proof import last_proof, prove_variant
from slmops.tasks.foundry.registration import register_variant, unregister_variant
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.report.assemble import variant_intervals, variant_metrics
from slmops.tasks.report.model_card import base_model_of, model_card
from slmops.tasks.report.records import VariantDetails, VariantReport
from slmops.tasks.verdict.gate import GateVerdict, judge_stored_variant
from slmops.tasks.verdict.thresholds import thresholds_for
from slmops.tasks.workshop import workshop


@dataclass(frozen=True)
class Qualification:
    """The request to qualify a version: rows, text, budget, and the checks that are allowed to fail.

    `generation_defaults` are those that the user gave for a new version; the report shows them. `statements` are the
    facts from the checkpoint's files that the last report of a stored version shows; None: they are read. With
    `constrain`, the answers under the output schema are examined too.
    """

    evaluation: EvaluationSet
    text: TextSample | None
    budget: Sequence[str]
    description: str
    promote: bool = False
    quick: bool = False
    allow: Sequence[str] = ()
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    statements: tuple[Statement, ...] | None = None
    constrain: bool = False

    @property
    def compared_exams(self) -> list[ComparedExam[Any]]:
        """The exams that compare a variant with its source checkpoint."""
        return [AnswersExam(self.evaluation), *([TextExam(self.text)] if self.text else [])]


def needs_source(asked: Qualification, version: Version) -> bool:
    """Whether a variant is not yet compared with the source checkpoint."""
    settings = workshop().settings
    return (
        needs_parity(version.variants)
        or any(exam.needs_source(version.variants, settings) for exam in asked.compared_exams)
        or needs_source_at_lengths(version.variants, asked.evaluation.decoding, settings)
    )


def run_sources(asked: Qualification, version: Version, prepared: PreparedCheckpoint) -> None:
    """Run the source checkpoint on the exams for which a variant is not yet compared."""
    for exam in asked.compared_exams:
        if exam.needs_source(version.variants, workshop().settings):
            run_source_once(exam, prepared)


@dataclass(frozen=True)
class Qualified:
    """The result for a variant, and whether it is new."""

    report: VariantReport
    changed: bool


def qualify_variant(
    asked: Qualification, variant: Variant, checkpoint: Path | None, elsewhere: Examined | None
) -> Qualified:
    """Examine, judge, register and prove a variant; a failure is reported.

    `checkpoint` is the folder of its source; None if there is none, or if it is not needed.
    """
    attempts = last_climb(variant.version).attempts.get(variant.precision, ())
    report = VariantReport.of(variant, "failed").model_copy(update={"attempts": attempts})
    try:
        evaluation = examine(AnswersExam(asked.evaluation), variant)
        details = _examined(asked, variant, evaluation, checkpoint, elsewhere)
        figures = {"metrics": variant_metrics(details), "intervals": variant_intervals(details)}
        report = report.model_copy(update={"details": details, **figures, **_reliability(details)})
        verdict = _judge(asked, variant, details, evaluation)
        allowed = tuple(dict.fromkeys(check.name for check in verdict.allowed_checks))
        warnings = (*report.warnings, *verdict.warnings)
        report = report.model_copy(update={"gate": verdict, "allowed": allowed, "warnings": warnings})
        if verdict.passed:
            return _registered(asked, variant, report, evaluation)
        removed = unregister_variant(variant, workshop().settings)
        return Qualified(report.model_copy(update={"status": "rejected"}), changed=bool(removed))
    except StageFailed as error:
        return Qualified(report.model_copy(update={"error": str(error), "foundry_model_id": None}), changed=True)


def _examined(
    asked: Qualification, variant: Variant, evaluated: Evaluation, checkpoint: Path | None, elsewhere: Examined | None
) -> VariantDetails:
    """Take all exams that the gate judges; stored answers are reused.

    If the variant's vocabulary differs from its checkpoint's, no other exam is taken.
    """
    if not evaluated.vocabulary.comparable:
        return VariantDetails(evaluation=evaluated)
    rows = asked.evaluation.rows
    measured = answered(MeasurementExam(), variant, elsewhere)
    at_lengths = SourceLengthsExam(measured, checkpoint, asked.evaluation.decoding)
    can_ask = at_lengths.can_be_asked(variant, workshop().settings)
    silent = examine(at_lengths, variant) if can_ask else None
    parity = examine(ParityExam(checkpoint), variant)
    text = examine(TextExam(asked.text), variant) if asked.text else None
    workshop().end_torch()  # the soak takes most memory; a variant that asks the checkpoint more starts torch in 4 s
    endurance = answered_together(endurance_exams(variant, rows), variant, elsewhere)
    return VariantDetails(
        measurement=measured,
        evaluation=evaluated,
        length_sweep=length_sweep_of(measured, silent.silent if silent else ()),
        parity=parity,
        text=text,
        endurance=endurance,
        constraint=examine(ConstraintExam(asked.evaluation), variant) if asked.constrain else None,
    )


def _reliability(details: VariantDetails) -> dict[str, Any]:
    measured = details.measurement
    if measured is None:
        return {}
    return {"reliable": measured.reliable, "warnings": (measured.warning,) if measured.warning else ()}


def _judge(asked: Qualification, variant: Variant, details: VariantDetails, evaluation: Evaluation) -> GateVerdict:
    return judge_stored_variant(
        variant,
        evaluation,
        thresholds_for(variant.precision, workshop().settings.gate),
        length_sweep=details.length_sweep,
        parity=details.parity,
        text=details.text,
        endurance=details.endurance,
        allow=asked.allow,
    )


def _registered(asked: Qualification, variant: Variant, report: VariantReport, evaluation: Evaluation) -> Qualified:
    settings, manifest = workshop().settings, variant.version.manifest
    report = report.model_copy(update={"foundry_model_id": model_id_of(variant)})
    license_of_source = variant.version.latest(LICENSE)
    card = model_card(
        manifest,
        report,
        evaluation=asked.evaluation.summary,
        description=asked.description,
        base_model=base_model_of(manifest.source.origin),
        license_name=license_of_source.name if license_of_source else None,
    )
    registration = register_variant(variant, asked.description, card, settings)
    row = asked.evaluation.proof_row
    evaluated = evaluation.rows[rows.index(row)] if row in (rows := asked.evaluation.rows) else None
    thinking = asked.evaluation.decoding.thinking if asked.evaluation.decoding else None
    known = None if registration.changed else last_proof(variant, row)
    proof = known or prove_variant(variant, row, evaluated, thinking, settings)
    noted = report.gate.notes if report.gate else ()
    update = {
        "status": "registered",
        "answer": proof.text,
        "notes": (*noted, *registration.notes, *proof.notes),
    }
    return Qualified(report.model_copy(update=update), changed=known is None)
