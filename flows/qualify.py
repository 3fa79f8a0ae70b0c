"""The common part of `deploy` and `regate`: a stored version's variants are judged, registered, proven and chosen."""

from collections.abc import Mapping, Sequence

from prefect import State
from prefect.states import Completed, Failed

from slmops.flows.endings import RunEnded
from slmops.infra.storage.version import Version
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams import first_look
from slmops.tasks.exams.on_workers import examine_on_workers
from slmops.tasks.exams.source import has_source, sources_in_use
from slmops.tasks.exams.statements import Statement, statements_of
from slmops.tasks.report.assemble import deploy_report, failures_of, judged
from slmops.tasks.report.publish import publish_report
from slmops.tasks.report.records import DeployReport
from slmops.tasks.request.budget import parse_budget
from slmops.tasks.verdict.choice import choose_variant
from slmops.tasks.versions.champion import Standing, settle_champion
from slmops.tasks.versions.commit import record_choice
from slmops.tasks.versions.qualification import Qualification, qualify_variant, run_sources
from slmops.tasks.workshop import workshop


class DeployEnded(RunEnded):
    """A run that ended with a failed variant, or without one to serve; `report` has the details."""

    def __init__(self, report: DeployReport) -> None:
        super().__init__(report.summary, "The report names each variant's figures and failures.")
        self.report = report
        self.exit_code = 3 if report.status == "rejected" else 1


def qualify(
    asked: Qualification,
    version: Version,
    prepared: PreparedCheckpoint | None,
    *,
    errors: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
) -> DeployReport:
    """Qualify every variant of a version, choose the one that serves, settle the champion, and publish the report.

    `prepared` is the source checkpoint; None if the model came as ONNX, or if no checkpoint is needed.
    `errors` say, by precision, why variants could not be built. Raises, after the report is published, the error that
    kept the version from becoming the champion.
    """
    settings, source = workshop().settings, version.manifest.source.digest
    with version.in_use(), sources_in_use(asked.compared_exams, source):
        if prepared:
            run_sources(asked, version, prepared)
        elsewhere = examine_on_workers(version, asked.evaluation.rows)
        found = {}
        for variant in sorted(version.variants, key=lambda variant: variant.size_bytes):  # what all share costs least
            checkpoint = prepared.folder if prepared and has_source(variant) else None
            found[variant.precision] = qualify_variant(asked, variant, checkpoint, elsewhere.get(variant.precision))
        outcomes = [found[variant.precision] for variant in version.variants]

        registered = [outcome.report for outcome in outcomes if outcome.report.status == "registered"]
        choice = choose_variant([judged(report) for report in registered], parse_budget(asked.budget))
        record_choice(version, choice, asked.budget)
        standing = Standing()
        if asked.quick:
            warnings = (first_look.WARNING, *warnings)
        elif choice.selected:
            standing = settle_champion(version.variant(choice.selected), settings, promote=asked.promote)
        report = deploy_report(
            version,
            asked.evaluation,
            [*failures_of(errors or {}), *(outcome.report for outcome in outcomes)],
            choice,
            budget=asked.budget,
            description=asked.description,
            champion_id=standing.foundry_model_id,
            warnings=(*warnings, *standing.warnings),
            unchanged=not any(outcome.changed for outcome in outcomes),
            statements=_statements(asked, prepared),
        )
        report = publish_report(report, version, settings)
    if standing.refusal:
        raise standing.refusal
    return report


def _statements(asked: Qualification, prepared: PreparedCheckpoint | None) -> tuple[Statement, ...]:
    if asked.statements is not None:
        return asked.statements
    return statements_of(prepared.folder, prepared.inspection, asked.generation_defaults) if prepared else ()


def ended(report: DeployReport) -> State[DeployReport]:
    """Return the flow run's final state for a report."""
    if report.status in ("registered", "unchanged", "built"):
        return Completed(message=report.summary, data=report)
    name = "Rejected" if report.status == "rejected" else "Failed"
    return Failed(name=name, message=report.summary, data=DeployEnded(report))
