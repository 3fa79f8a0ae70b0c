"""The flow `deploy`: from a checkpoint to a registered, proven model."""

from dataclasses import asdict

from prefect import State, flow

from slmops.flows.qualify import ended, qualify
from slmops.tasks.build.build import copy_out
from slmops.tasks.build.climbing import climb, record_climb
from slmops.tasks.build.planning import fitting_recipes, plan_recipes
from slmops.tasks.build.pools import check_pools
from slmops.tasks.build.search import record_trials
from slmops.tasks.build.variants import build_each
from slmops.tasks.checkpoint.family import prove_family
from slmops.tasks.checkpoint.preparation import prepare_checkpoint, put_into_store
from slmops.tasks.choices import CHOICES
from slmops.tasks.environment.checks import check_environment, check_room
from slmops.tasks.exams.constraint import check_constraint, record_response_format
from slmops.tasks.exams.decoding import settle_decoding
from slmops.tasks.exams.early_parity import check_templates
from slmops.tasks.exams.first_look import evaluation_for, workshop_for
from slmops.tasks.exams.source import sources_in_use
from slmops.tasks.exams.text import read_text
from slmops.tasks.plan import parse_request
from slmops.tasks.questions.evaluation_set import read_evaluation
from slmops.tasks.report.assemble import built_report, failed_report
from slmops.tasks.report.publish import publish_report, write_model_cards
from slmops.tasks.report.records import DeployReport
from slmops.tasks.request.declaration import takes
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.request.inputs import fetch_inputs
from slmops.tasks.request.parameters import DeployParameters
from slmops.tasks.runs.limits import one_at_a_time
from slmops.tasks.runs.names import run_name
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.commit import commit_version, record_provenance
from slmops.tasks.versions.lookup import check_store
from slmops.tasks.versions.qualification import Qualification
from slmops.tasks.workshop import in_workshop, working_in, workshop


@flow(name="deploy", flow_run_name=run_name("deploy-{name}"))
@ends_by_its_errors
@in_workshop
@takes(DeployParameters, CHOICES)
def deploy(parameters: DeployParameters) -> State[DeployReport]:
    """Build, store, measure, judge, register and prove a fine-tuned small language model.

    Returns:
        The report, as a completed state; a failed one named `Rejected` when every variant was rejected, and a failed
        one when a variant could not be built or proven.
    """
    request = parse_request(fetch_inputs(asdict(parameters)))
    check_store()
    check_pools()
    with one_at_a_time(f"deploy-{request.name}"), working_in(workshop_for(request)):
        return ship(request)


def ship(request: DeployRequest) -> State[DeployReport]:
    """Run the requested stages in order."""
    shop = workshop()
    check_environment("cpu" if request.build_only else request.execution_provider, shop.settings)
    recipes = plan_recipes(request)
    prepared = prepare_checkpoint(request, shop.settings)
    if request.build_only:  # the machine that judges reads the checkpoint from the store
        prepared = prepared.model_copy(update={"origin": put_into_store(prepared, shop.registry)})
    recipes = fitting_recipes(recipes, request, prepared.inspection.quantized)
    settled = settle_decoding(prepared.folder, request.generation_defaults)
    read = read_evaluation(
        request.evaluation_file,
        prepared.folder,
        shop.settings,
        scorer=request.scorer,
        output_schema_file=request.output_schema_file,
        output_regex=request.output_regex,
    ).decoded_by(settled.answering(request.max_thought_tokens))
    evaluation = evaluation_for(request, read).in_modes(request.thinking, shop.settings.evaluation.max_rows)
    if request.constrain:
        check_constraint(evaluation)
    asked = Qualification(
        evaluation=evaluation,
        text=read_text(request.text_file) if request.text_file else None,
        budget=request.budget,
        description=request.description,
        promote=request.promote,
        quick=request.quick,
        allow=request.allow,
        generation_defaults=request.generation_defaults,
        constrain=request.constrain,
    )
    check_room(
        prepared.inspection,
        [recipe.precision for recipe in recipes],
        len(evaluation.rows),
        shop.settings,
        whole_model=[recipe.precision for recipe in recipes if recipe.quantizes_at_once],
        calibrated=[recipe.precision for recipe in recipes if recipe.is_calibrated],
    )

    check_templates(prepared, evaluation.rows, request.calibration_file, request.allow)
    prove_family(prepared, [recipe.precision for recipe in recipes])
    with sources_in_use(asked.compared_exams, prepared.digest):  # trials' answers
        built_first = build_each(request, recipes, prepared, evaluation)
        climbed = climb(built_first, recipes, request, prepared, evaluation, asked.text)
        built = climbed.built
        if not built.variants:
            report = failed_report(request, prepared, evaluation, built.errors)
            return ended(publish_report(report, None, shop.settings))
        if request.output:
            copy_out([variant.variant for variant in built.variants], request.output)
        version = commit_version(request, prepared, built.variants)
        record_provenance(version)
        if request.constrain:
            record_response_format(version, evaluation)
        if built.search:
            record_trials(version, built.search)
        record_climb(version, climbed)
        known = (*prepared.inspection.warnings, *settled.warnings)
        warnings = (*known, *climbed.warnings, *shop.registry.objects.notices())
        if request.build_only:
            report = built_report(version, prepared, evaluation, errors=built.errors, warnings=warnings)
            return ended(publish_report(report, None, shop.settings))
        report = qualify(asked, version, prepared, errors=built.errors, warnings=warnings)
        if request.output:
            write_model_cards(report, version.manifest, request.output)
        return ended(report)
