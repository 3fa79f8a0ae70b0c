"""The flow `deploy`: from a checkpoint to a registered, proven model."""

from collections.abc import Sequence
from dataclasses import asdict

from prefect import State, flow

from slmops.flows.qualify import Gate, Qualification, ended, qualify
from slmops.flows.variants import build_on_workers, check_workers
from slmops.infra.errors import StageFailed
from slmops.tasks.build.build import BuiltVariant, build_variant, copy_out
from slmops.tasks.build.given import take_model
from slmops.tasks.build.planning import plan_recipes
from slmops.tasks.build.recipes import Recipe
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint, prepare_checkpoint
from slmops.tasks.environment.checks import check_environment, check_room
from slmops.tasks.exams.answers import AnswersExam
from slmops.tasks.exams.source import sources_in_use
from slmops.tasks.exams.text import read_text
from slmops.tasks.plan import parse_request
from slmops.tasks.questions.evaluation_set import read_evaluation
from slmops.tasks.report.assemble import failed_report
from slmops.tasks.report.publish import publish_report, write_model_cards
from slmops.tasks.report.records import DeployReport, VariantReport
from slmops.tasks.request.declaration import takes
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.request.inputs import with_local_files
from slmops.tasks.request.parameters import DeployParameters
from slmops.tasks.runs.limits import one_at_a_time
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.verdict.search import record_trials, search_recipes
from slmops.tasks.versions.commit import commit_version, record_provenance
from slmops.tasks.workshop import Workshop, open_workshop, workshop


@flow(name="deploy", flow_run_name="deploy-{name}")
@ends_by_its_errors
@open_workshop()
@takes(DeployParameters)
def deploy(parameters: DeployParameters) -> State[DeployReport]:
    """Build, store, measure, judge, register and prove a fine-tuned small language model.

    Returns:
        The report, as a completed state; a failed one named `Rejected` when every variant fell short, and a failed
        one when a variant could not be built or proven.
    """
    shop = workshop()
    request = parse_request(with_local_files(asdict(parameters), shop.settings))
    shop.registry.objects.check()
    check_workers(shop.settings)
    with one_at_a_time(f"deploy-{request.name}"):
        return ship(request, shop)


def ship(request: DeployRequest, shop: Workshop) -> State[DeployReport]:
    """Take the journey that is asked for: the stages, in order."""
    settings, registry = shop.settings, shop.registry
    check_environment(request.execution_provider, settings)
    planned = plan_recipes(request)
    prepared = prepare_checkpoint(request, settings)
    evaluation = read_evaluation(
        request.evaluation_file,
        prepared.folder,
        settings,
        scorer=request.scorer,
        output_schema_file=request.output_schema_file,
        output_regex=request.output_regex,
    )
    text = read_text(request.text_file) if request.text_file else None
    check_room(
        prepared.inspection,
        [recipe.precision for recipe in planned],
        len(evaluation.rows),
        settings,
        whole_model=[recipe.precision for recipe in planned if recipe.quantizes_at_once],
    )

    with sources_in_use([AnswersExam(evaluation)], prepared.digest):
        outcome = None
        if request.search:
            built, outcome = search_recipes(
                request,
                prepared,
                evaluation,
            )
            failures = [
                VariantReport(precision=precision, status="failed", error=error)
                for precision, error in outcome.failures.items()
            ]
        else:
            built, failures = build_variants(request, planned, prepared, shop)
        if not built:
            report = failed_report(request, prepared, evaluation.summary, failures, settings)
            return ended(publish_report(report, None, settings))
        if request.output:
            copy_out([one.variant for one in built], request.output, registry)
        manifest = commit_version(request, prepared, built, registry)
        record_provenance(registry.of(manifest), settings.store)
        if outcome:
            record_trials(registry.of(manifest), outcome)
        version = Qualification(
            manifest=manifest,
            prepared=prepared,
            evaluation=evaluation,
            text=text,
            gate=Gate(request.min_top1_agreement, request.max_kl_divergence, request.max_quality_loss),
            budget=request.budget,
            description=request.description,
            promote=request.promote,
            registry=registry,
            settings=settings,
        )
        warnings = (
            *prepared.inspection.warnings,
            *(text for one in built for text in one.warnings),
            *registry.objects.notices(),
        )
        report = qualify(version, failures, warnings)
        if request.output:
            write_model_cards(report, manifest, request.output)
        return ended(report)


def build_variants(
    request: DeployRequest,
    recipes: Sequence[Recipe],
    prepared: PreparedCheckpoint,
    shop: Workshop,
) -> tuple[list[BuiltVariant], list[VariantReport]]:
    """Build every variant; one that fails is reported and the others go on."""
    settings, registry = shop.settings, shop.registry
    if prepared.inspection.kind == "genai":
        return [take_model(prepared, request, registry, settings)], []
    if settings.worker.pool:
        built, errors = build_on_workers(request, recipes, prepared, registry, settings)
        return built, [VariantReport(precision=one, status="failed", error=text) for one, text in errors.items()]
    built = []
    failures: list[VariantReport] = []
    for recipe in recipes:
        try:
            built.append(build_variant(recipe, prepared, request, registry, settings, shop.torch))
        except StageFailed as error:
            failures.append(VariantReport(precision=recipe.precision, status="failed", error=str(error)))
    return built, failures
