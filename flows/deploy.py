"""The flow `deploy`: from a checkpoint to a registered, proven model."""

from collections.abc import Sequence
from typing import Literal

from prefect import State, flow

from slmops.flows.qualify import Gate, Qualification, ended, qualify
from slmops.flows.variants import build_on_workers, check_workers
from slmops.infra.errors import StageFailed
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import Settings, load_settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.build.build import (
    BuiltVariant,
    Recipe,
    build_variant,
    copy_out,
    plan_recipes,
    take_model,
    torch_process,
)
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint, prepare_checkpoint
from slmops.tasks.environment.checks import check_environment, check_room
from slmops.tasks.exams.answers import reference_in_use
from slmops.tasks.exams.text import read_text
from slmops.tasks.questions.evaluation_set import read_evaluation
from slmops.tasks.report.assemble import failed_report
from slmops.tasks.report.publish import publish_report, write_model_cards
from slmops.tasks.report.records import DeployReport, VariantReport
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.request.inputs import with_local_files
from slmops.tasks.request.plan import parse_request
from slmops.tasks.runs.limits import one_at_a_time
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.verdict.search import record_trials, search_recipes
from slmops.tasks.versions.commit import commit_version, record_provenance


@flow(name="deploy", flow_run_name="deploy-{name}")
@ends_by_its_errors
def deploy(
    checkpoint: str,
    name: str,
    precisions: Sequence[Literal["fp16", "int8", "int4"]] = ("fp16", "int8", "int4"),
    device: Literal["cpu", "gpu", "npu"] = "cpu",
    execution_provider: Literal["cpu", "cuda", "dml", "webgpu"] = "cpu",
    base: str | None = None,
    revision: str | None = None,
    description: str = "",
    evaluation_file: str | None = None,
    scorer: str | None = None,
    output_schema_file: str | None = None,
    output_regex: str | None = None,
    text_file: str | None = None,
    budget: Sequence[str] = (),
    recipes: Sequence[str] = (),
    search: bool = False,
    chat_template_file: str | None = None,
    min_top1_agreement: float | None = None,
    max_kl_divergence: float | None = None,
    max_quality_loss: float | None = None,
    max_length: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    olive_config_file: str | None = None,
    output: str | None = None,
    promote: bool = False,
    training_run: str | None = None,
) -> State[DeployReport]:
    """Build, store, measure, judge, register and prove a fine-tuned small language model.

    Args:
        checkpoint: Folder of the checkpoint, Hub id (owner/name), s3:// folder, or store:// address. A LoRA adapter is
            merged into its base first; a folder that already is an onnxruntime-genai model is not built again.
        name: Name of the model: lower-case letters, digits and hyphens.
        precisions: Precisions to build.
        device: Device that will serve the model.
        execution_provider: ONNX Runtime's execution provider on that device.
        base: Base of a LoRA adapter (folder or Hub id); default: the one that the adapter names.
        revision: Revision of a Hub id: branch, tag or commit.
        description: What the model is for; shown by Foundry Local.
        evaluation_file: JSONL rows {id, messages, expected}; default: eval.jsonl in the checkpoint's folder, else
            a built-in set of prompts, of which only the distributions are compared.
        scorer: How an answer is scored where its row does not say: exact_match, normalized_match, contains, regex,
            json_equality, rouge_l or numeric, or a JSON object {"name": ..., options}; default: exact_match.
        output_schema_file: JSON Schema that every answer must conform to; default: output_schema.json in the
            checkpoint's folder.
        output_regex: Regular expression that every answer must match as a whole.
        text_file: UTF-8 text on which perplexity and distributions are compared too.
        budget: Limits of the chosen variant, each KEY=VALUE: max-size=300MB, max-rss=1GB, max-ttft=200ms,
            min-tps=20, max-quality-loss=0.02. Without one the smallest precision that passes the gate is chosen.
        recipes: Recipes to use in place of a precision's default, such as int4-block128.
        search: Build and measure several recipes per precision, and keep the best.
        chat_template_file: Jinja file to use in place of the tokenizer's chat template.
        min_top1_agreement: Gate: smallest share of positions with the reference's most likely token (0 to 1).
        max_kl_divergence: Gate: largest mean KL divergence from the reference, in nats per token.
        max_quality_loss: Gate: largest drop of the task score below the reference's (0 to 1).
        max_length: Longest prompt plus answer, in tokens.
        temperature: Sampling temperature that the model is registered with.
        top_p: Nucleus sampling threshold that the model is registered with.
        repetition_penalty: Repetition penalty that the model is registered with.
        olive_config_file: Olive run configuration (JSON) to use in place of slmops' recipes.
        output: New folder for a plain copy of what was built.
        promote: Make this version the champion.
        training_run: Training run that made the checkpoint (an id or a URL), for the version's manifest.

    Returns:
        The report, as a completed state; a failed one named `Rejected` when every variant fell short, and a failed
        one when a variant could not be built or proven.
    """
    parameters = dict(locals())
    settings = load_settings()
    request = parse_request(with_local_files(parameters, settings))
    registry = open_registry(settings)
    registry.objects.check()
    check_workers(settings)
    with one_at_a_time(f"deploy-{request.name}"):
        return ship(request, registry, settings)


def ship(request: DeployRequest, registry: ModelRegistry, settings: Settings) -> State[DeployReport]:
    """Take the journey that is asked for: the stages, in order."""
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
    text = read_text(request.text_file, settings) if request.text_file else None
    check_room(
        prepared.inspection,
        [recipe.precision for recipe in planned],
        len(evaluation.rows),
        settings,
        whole_model=[recipe.precision for recipe in planned if recipe.quantizes_at_once],
    )

    with torch_process(settings) as torch_child, reference_in_use(prepared.digest, evaluation, settings):
        outcome = None
        if request.search:
            built, outcome = search_recipes(
                request,
                prepared,
                evaluation,
                registry,
                settings,
                torch_child,
                reference_available=prepared.inspection.parameters > 0,
            )
            failures = [
                VariantReport(precision=precision, status="failed", error=error)
                for precision, error in outcome.failures.items()
            ]
        else:
            built, failures = build_variants(request, planned, prepared, registry, settings, torch_child)
        if not built:
            report = failed_report(request, prepared, evaluation.summary, failures, settings)
            return ended(publish_report(report, registry, None, settings))
        if request.output:
            copy_out([one.variant for one in built], request.output, registry)
        manifest = commit_version(request, prepared, built, registry)
        record_provenance(manifest, registry, settings)
        if outcome:
            record_trials(manifest, outcome, registry, settings)
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
            torch_child=torch_child,
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
    registry: ModelRegistry,
    settings: Settings,
    torch_child: ChildProcess,
) -> tuple[list[BuiltVariant], list[VariantReport]]:
    """Build every variant; one that fails is reported and the others go on."""
    if prepared.inspection.kind == "genai":
        return [take_model(prepared, request, registry, settings)], []
    if settings.worker.pool:
        built, errors = build_on_workers(request, recipes, prepared, registry, settings)
        return built, [VariantReport(precision=one, status="failed", error=text) for one, text in errors.items()]
    built = []
    failures: list[VariantReport] = []
    for recipe in recipes:
        try:
            built.append(build_variant(recipe, prepared, request, registry, settings, torch_child))
        except StageFailed as error:
            failures.append(VariantReport(precision=recipe.precision, status="failed", error=str(error)))
    return built, failures
