"""A deploy's plan and estimates, made without writing anything."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.checkpoints.hub import fetch_from_hub
from slmops.infra.checkpoints.quantized import quantization_of
from slmops.infra.checkpoints.source import SourceKind, parse_checkpoint
from slmops.infra.olive.architectures import check_family_precisions
from slmops.infra.records import Record
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.signatures import verification_key
from slmops.tasks.build.calibration import check_lengths, read_calibration_file
from slmops.tasks.build.planning import plan_recipes, plan_search, refuse_recipes
from slmops.tasks.checkpoint.adapter_base import base_of, inspect_for_merge, usable_base
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.environment.checks import (
    check_packages,
    check_resources,
    check_system,
    require_packages,
    require_resources,
)
from slmops.tasks.environment.estimates import StageEstimate, estimate_stages
from slmops.tasks.exams.first_look import looked_at, planned_look
from slmops.tasks.exams.planned_statements import planned_statements
from slmops.tasks.exams.statements import Statement
from slmops.tasks.exams.text import read_text_file
from slmops.tasks.foundry.ids import foundry_model_id
from slmops.tasks.questions.evaluation_set import EvaluationRow, read_rows
from slmops.tasks.request.deploy_request import DeployRequest, check_precisions, read_chat_template_file
from slmops.tasks.request.gate_limits import with_limits
from slmops.tasks.request.inputs import with_local_files
from slmops.tasks.verdict.checks import check_allowed
from slmops.tasks.verdict.thresholds import thresholds_for


class DeployPlan(Record):
    """The plan that `slmops deploy --dry-run` shows; times in s, sizes in bytes."""

    name: str
    parameters: int
    architecture: str
    rows: int
    stages: tuple[StageEstimate, ...]
    time_s: float
    warnings: tuple[str, ...]
    statements: tuple[Statement, ...] = ()


def parse_request(parameters: dict[str, Any]) -> DeployRequest:
    """Return the request from flow parameters; raises `BadInput` for one that is not valid."""
    if "precisions" in parameters:
        parameters = {**parameters, "precisions": check_precisions(parameters["precisions"])}
    request = DeployRequest.of(parameters).checked()
    request = planned_look(replace(request, allow=check_allowed(request.allow)))
    foundry_model_id(request.name, request.precisions[0], request.device, version=1)  # refuses unknown names
    return request


def plan_deploy(settings: Settings, parameters: dict[str, object]) -> DeployPlan:
    """Check everything that can be checked before work begins, and estimate the work.

    Raises `BadInput` for anything that would make the deploy fail: names, files, an unsupported or damaged checkpoint,
    too little memory or disk. A remote checkpoint can be inspected only after it was fetched; the flow does that.
    """
    open_registry(settings).objects.check()
    if settings.store.require_signature:
        verification_key(settings.store)
    request = parse_request(with_local_files(parameters, settings))
    recipes = plan_search(request) if request.search else plan_recipes(request)
    limits = with_limits(settings, vars(request)).gate
    for recipe in recipes:
        thresholds_for(recipe.precision, limits)
    require_packages([*check_system(), *check_packages()])
    source = parse_checkpoint(request.checkpoint, request.revision)
    if source.kind is SourceKind.HUB:
        _check_on_hub(source.location, source.revision, settings)
    if source.kind is not SourceKind.LOCAL:
        rows = _rows(request, None, settings)
        return DeployPlan(
            name=request.name,
            parameters=0,
            architecture="unknown",
            rows=len(rows),
            stages=(),
            time_s=0,
            warnings=(f"{source.location} is fetched first; its stages can be planned after that.",),
        )
    folder = Path(source.location)
    inspection = inspect_checkpoint(folder, chat_template_given=bool(request.chat_template_file))
    if inspection.kind == "genai":
        refuse_recipes(request)
    rows = _rows(request, folder, settings)
    if request.calibration_file:
        chats = read_calibration_file(request.calibration_file, rows)
        check_lengths(chats, folder, inspection.context_length, settings.calibration.max_tokens)
    template = read_chat_template_file(Path(request.chat_template_file)) if request.chat_template_file else None
    base, to_fetch = None, ""
    if inspection.kind == "adapter":
        base = _local_base(folder, request, settings)
        if base is None:
            to_fetch = "The adapter's base is fetched first: what its files say is known after that."
        else:
            inspection = inspect_for_merge(folder, base, chat_template_given=template is not None)
    statements = planned_statements(folder, inspection, request.generation_defaults, template=template, base=base)
    check_family_precisions(inspection.architecture, [recipe.precision for recipe in recipes])
    used = min(len(rows), settings.evaluation.max_rows)
    stages = estimate_stages(
        inspection,
        [recipe.precision for recipe in recipes],
        rows=used,
        positions=settings.evaluation.max_positions,
        whole_model=[recipe.precision for recipe in recipes if recipe.quantizes_at_once],
        calibrated=[recipe.precision for recipe in recipes if recipe.is_calibrated],
    )
    require_resources(check_resources(stages, settings))
    return DeployPlan(
        name=request.name,
        parameters=inspection.parameters,
        architecture=inspection.architecture,
        rows=used,
        stages=tuple(stages),
        time_s=sum(stage.time_s for stage in stages),
        statements=statements,
        warnings=(
            *inspection.warnings,
            *([to_fetch] if to_fetch else []),
            *(text for recipe in recipes for text in recipe.warnings),
        ),
    )


def _rows(request: DeployRequest, folder: Path | None, settings: Settings) -> list[EvaluationRow]:
    if request.text_file:
        read_text_file(Path(request.text_file).expanduser(), settings.evaluation.max_text_tokens)
    rows = read_rows(
        request.evaluation_file,
        folder,
        scorer=request.scorer,
        output_schema_file=request.output_schema_file,
        output_regex=request.output_regex,
    )
    return [*looked_at(rows[: settings.evaluation.max_rows])] if request.quick else rows


def _check_on_hub(repo_id: str, revision: str | None, settings: Settings) -> None:
    """Fetch only the config, so that a missing model or network and a foreign quantization are told before the flow."""
    with TemporaryDirectory() as aside:  # a refused deploy leaves nothing under the home directory
        elsewhere = settings.model_copy(update={"home": Path(aside)})
        folder = fetch_from_hub(repo_id, revision, elsewhere, files=("config.json", "adapter_config.json"))
        quantization_of(read_json(folder / "config.json") if (folder / "config.json").is_file() else {})


def _local_base(adapter: Path, request: DeployRequest, settings: Settings) -> Path | None:
    """Return the folder of an adapter's base, or None for one that is to be fetched."""
    base = base_of(adapter, request.base)
    with usable_base(base):
        source = parse_checkpoint(base)
        if source.kind is SourceKind.HUB:
            _check_on_hub(source.location, source.revision, settings)
    return Path(source.location) if source.kind is SourceKind.LOCAL else None
