"""A given model: an onnxruntime-genai folder that is stored unchanged."""

from slmops.infra.foundry.model_folder import INFERENCE_MODEL, MODEL_CARD
from slmops.infra.genai.model_files import detect_precision
from slmops.infra.storage.folders import link_or_copy, work_folder
from slmops.infra.storage.manifest import StoredVariant, digest_of
from slmops.tasks.build.build import BuiltVariant, set_generation_defaults
from slmops.tasks.build.planning import refuse_recipes
from slmops.tasks.checkpoint.inspection import EVALUATION_FILE, OUTPUT_SCHEMA_FILE
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop

# Files in a model's folder that are not part of the model.
NOT_OF_THE_MODEL = (EVALUATION_FILE, OUTPUT_SCHEMA_FILE, INFERENCE_MODEL, MODEL_CARD)


@stage("take model", run_name="take-{request.name}")
def take_model(prepared: PreparedCheckpoint, request: DeployRequest) -> BuiltVariant:
    """Store a folder that already is an onnxruntime-genai model, as the only variant of its version."""
    shop = workshop()
    refuse_recipes(request)
    precision = detect_precision(prepared.folder)
    with stage_progress(f"take {precision}") as on_progress, work_folder(shop.settings) as work:
        model = work / "model"
        model.mkdir()
        for path in prepared.folder.iterdir():
            if path.is_file() and path.name not in NOT_OF_THE_MODEL:
                link_or_copy(path, model / path.name)
        set_generation_defaults(model, request.generation_defaults)
        variant = StoredVariant(
            precision=precision,
            device=request.device,
            execution_provider=request.execution_provider,
            recipe="as given",
            recipe_digest=digest_of({"recipe": "as given"}),
            files=shop.registry.add_files(model, on_progress),
        )
    return BuiltVariant(variant=variant, wall_s=0.0, peak_rss_bytes=0, log="")
