"""Builds: one variant by its recipe, in a child process, and only once if several runs request the same."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from slmops.infra.checkpoints.dequantization import packed_checkpoint
from slmops.infra.checkpoints.folder import read_json
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.files import write_whole
from slmops.infra.genai.calls import Probe
from slmops.infra.genai.served_files import MENDS, MendedFile, mend_files
from slmops.infra.olive.calls import Build
from slmops.infra.olive.gptq_rounding import ROUNDING
from slmops.infra.process.slots import only_maker, slot
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.records import Json, Record
from slmops.infra.reference.decoding import PLAIN
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import place, work_folder
from slmops.infra.storage.leftovers import made_aside
from slmops.infra.storage.manifest import StoredVariant, digest_of
from slmops.tasks.build.calibration import Calibration
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.recipes import OLIVE_CONFIG, Recipe
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.environment.host import builder_versions
from slmops.tasks.exams.decoding import settle_decoding
from slmops.tasks.request.deploy_request import DeployRequest, check_output
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop

NOT_RUN = frozenset(
    {"model-does-not-open", "model-does-not-run", "genai-config-not-valid"}
)  # codes of onnxruntime-genai's


class BuiltVariant(Record):
    """A variant whose files are in the store, with the build's wall time in s and peak memory in bytes.

    `passes` are the recipe's Olive passes: the manifest has only their digest. `calibration` says what they were
    calibrated on, `mended` are the files for chats that differ from the checkpoint's. `host` is the building machine,
    if it is another one.
    """

    variant: StoredVariant
    wall_s: float
    peak_rss_bytes: int
    log: str
    warnings: tuple[str, ...] = ()
    passes: dict[str, Json] = Field(default_factory=dict)
    calibration: str | None = None
    mended: tuple[MendedFile, ...] = ()
    host: Json | None = None


# Prefect can limit task runs by tag, but each tagged run costs a request to the server. Only builds have a tag, because
# only they need so much memory.
@stage("build variant", run_name="build-{recipe.name}", tags=["slmops-build"])
def build_variant(
    recipe: Recipe, prepared: PreparedCheckpoint, request: DeployRequest, calibration: Calibration | None = None
) -> BuiltVariant:
    """Build one variant and store its files; a stored build is reused.

    `calibration` is what a calibrated recipe needs; others ignore it.
    Raises `StageFailed` and its kinds as `run_in_child` does.
    """
    shop = workshop()
    settings, registry = shop.settings, shop.registry
    calibration = calibration if recipe.is_calibrated else None
    settled = settle_decoding(prepared.folder, request.generation_defaults)
    decoding = {} if settled.decoding == PLAIN else {"decoding": settled.decoding.model_dump(mode="json")}
    key = digest_of(
        {
            "source": prepared.digest,
            "recipe": recipe.digest,
            "builder": builder_versions(),
            "generation": request.generation_defaults,
            "device": request.device,
            **({"calibration": calibration.digest} if calibration else {}),
            "rounding": ROUNDING,
            **decoding,
            "mends": MENDS,
        }
    )
    record = settings.cache_dir / "builds" / f"{key}.json"
    with stage_progress(f"build {recipe.name}") as on_progress, only_maker(record, on_progress):
        if record.is_file():
            built = BuiltVariant.model_validate_json(record.read_bytes())
            if not registry.claim_files(built.variant.files):
                on_progress(1, 1, "built before")
                return built
        log = settings.cache_dir / "logs" / f"build-{request.name}-{recipe.name}-{key[:12]}.log"
        log.unlink(missing_ok=True)
        slots = settings.cache_dir / "build-slots"
        with slot(slots, settings.worker.builds, on_progress), work_folder(settings) as work:
            child = shop.torch.run(
                Build(
                    olive_config=olive_run_config(recipe),
                    checkpoint_dir=packed_checkpoint(prepared.folder, work / "packed"),
                    output_dir=work / "model",
                    cache_dir=work / "cache",
                    threads=settings.threads,
                    calibration=calibration.rows if calibration else (),
                ),
                deadline_s=settings.timeout.build_s,
                log_path=log,
                work_dir=work,
                on_progress=on_progress,
            )
            penalty = {"repetition_penalty": settled.decoding.repetition_penalty} if decoding else {}
            set_generation_defaults(work / "model", {**penalty, **request.generation_defaults})
            set_end_tokens(work / "model", settled.end_token_ids)
            mended = mend_files(work / "model", prepared.folder)
            if recipe.id == OLIVE_CONFIG and recipe.execution_provider == "cpu":
                check_that_it_runs(work / "model", settings, work)
            variant = StoredVariant(
                precision=recipe.precision,
                device=request.device,
                execution_provider=recipe.execution_provider,
                recipe=recipe.id,
                recipe_digest=recipe.digest,
                files=registry.add_files(work / "model", on_progress),
            )
        built = BuiltVariant(
            variant=variant,
            wall_s=child.wall_s,
            peak_rss_bytes=child.peak_rss_bytes,
            log=log.read_text("utf-8", "replace"),
            warnings=recipe.warnings,
            passes=recipe.passes,
            calibration=calibration.summary if calibration else None,
            mended=mended,
        )
        write_whole(record, built.model_dump_json(indent=2))
    return built


def check_that_it_runs(model: Path, settings: Settings, work: Path) -> None:
    """Raise `BadInput` if onnxruntime-genai cannot run what a user's own passes made of a model."""
    call = Probe(model_dir=model, threads=settings.threads)
    try:
        run_in_child(call, deadline_s=settings.timeout.evaluate_s, log_path=work / "probe.log", work_dir=work)
    except StageFailed as error:
        if error.code not in NOT_RUN:
            raise
        raise BadInput(
            f"onnxruntime-genai cannot run the result of the Olive configuration: {error.message}",
            "Change or leave out the passes beside ModelBuilder.",
            code="olive-result-does-not-run",
        ) from error


def set_generation_defaults(folder: Path, defaults: dict[str, float]) -> None:
    """Write generation parameters into a model's genai_config.json, where the runtime reads them.

    A temperature of 0 means greedy. Raises `BadInput` for a max_length beyond the model's context.
    """
    if not defaults:
        return
    path = folder / "genai_config.json"
    config = read_json(path)
    context = int(config["model"]["context_length"])
    if defaults.get("max_length", 0) > context:
        raise BadInput(
            f"max_length is {defaults['max_length']:.0f}, the model's context is {context} tokens.",
            "Give a smaller one.",
        )
    search = {**config.get("search", {}), **{name: value for name, value in defaults.items() if name != "temperature"}}
    if "temperature" in defaults:
        search["do_sample"] = defaults["temperature"] > 0
        if search["do_sample"]:
            search["temperature"] = defaults["temperature"]
    path.unlink()  # the file may be a link to the user's own file
    path.write_text(json.dumps({**config, "search": search}, indent=4), "utf-8", newline="\n")


def set_end_tokens(folder: Path, end_token_ids: Sequence[int]) -> None:
    """Write the tokens that end an answer into a model's genai_config.json, unless it already names them."""
    path = folder / "genai_config.json"
    config = read_json(path)
    named = config["model"].get("eos_token_id")
    if not end_token_ids or {*(named if isinstance(named, list) else [named])} == {*end_token_ids}:
        return
    config["model"]["eos_token_id"] = list(end_token_ids)
    path.write_text(json.dumps(config, indent=4), "utf-8", newline="\n")


@stage("copy out", run_name="copy-out")
def copy_out(variants: Sequence[StoredVariant], output: str) -> None:
    """Write a plain copy of every variant into a new folder, one folder per precision."""
    target = Path(output).expanduser().absolute()
    check_output(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with made_aside(target) as aside:
        for variant in variants:
            workshop().registry.copy_files(variant.files, aside / variant.precision)
        if target.is_dir():
            target.rmdir()
        place(aside, target)
