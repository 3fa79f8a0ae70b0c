"""Recipes: what Olive is told for a precision on an execution provider, and the reading of a user's own Olive file."""

import copy
import hashlib
import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.errors import BadInput
from slmops.infra.files import write_whole
from slmops.infra.foundry.model_folder import INFERENCE_MODEL, MODEL_CARD
from slmops.infra.genai.model_files import detect_precision
from slmops.infra.olive.calls import Build
from slmops.infra.olive.options import BITS, BUILDER_OPTIONS, EXTRA_OPTIONS, olive_pass_types
from slmops.infra.process.slots import slot
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import link_or_copy, place, work_folder
from slmops.infra.storage.manifest import StoredVariant, digest_of
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.checkpoint.preparation import EVALUATION_FILE, OUTPUT_SCHEMA_FILE, PreparedCheckpoint
from slmops.tasks.environment.checks import builder_versions
from slmops.tasks.request.deploy_request import DeployRequest, check_output
from slmops.tasks.request.parameters import ExecutionProvider, Precision
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage

# One recipe a file: PROVIDER-PRECISION.json is the default of its precision, PROVIDER-PRECISION-NAME.json another one.
RECIPES_DIR = Path(__file__).parent / "recipes"
OLIVE_CONFIG = "olive-config"  # the id of a recipe that a user's Olive configuration makes
MODEL_BUILDER = "ModelBuilder"
# What stands beside a model without being part of it.
NOT_OF_THE_MODEL = (EVALUATION_FILE, OUTPUT_SCHEMA_FILE, INFERENCE_MODEL, MODEL_CARD)

# Olive's names of the execution providers, and the device that its systems pair them with.
OLIVE_PROVIDERS: dict[str, tuple[str, str]] = {
    "cpu": ("CPUExecutionProvider", "cpu"),
    "cuda": ("CUDAExecutionProvider", "gpu"),
    "dml": ("DmlExecutionProvider", "gpu"),
    "webgpu": ("WebGpuExecutionProvider", "gpu"),
}

# Keys of an Olive file that say where to read, write and log: slmops decides that, and they change no model.
IGNORED_KEYS = frozenset(
    {
        "cache_dir",
        "clean_cache",
        "clean_evaluation_cache",
        "evaluate_input_model",
        "log_severity_level",
        "log_to_file",
        "no_artifacts",
        "ort_log_severity_level",
        "ort_py_log_severity_level",
        "output_dir",
        "workflow_id",
    }
)
KNOWN_KEYS = IGNORED_KEYS | {"data_configs", "engine", "host", "input_model", "passes", "systems", "target"}
INPUT_MODEL_KEYS = frozenset({"type", "model_path", "task"})
SYSTEM_KEYS = frozenset({"type", "accelerators"})
ACCELERATOR_KEYS = frozenset({"device", "execution_providers"})

# The pass's options by the names that Olive's own ModelBuilder gives or gave them.
OPTION_ALIASES = {
    f"int4_{name}": name
    for name in (
        "accuracy_level",
        "algo_config",
        "block_size",
        "is_symmetric",
        "nodes_to_exclude",
        "op_types_to_quantize",
    )
}


class Recipe(BaseModel):
    """What one variant is built by.

    `passes` are Olive's, by name and in order, the first of type ModelBuilder; `warnings` are for the user. `id` says
    where it comes from, such as `cpu-int4-block128`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = OLIVE_CONFIG
    precision: Precision
    execution_provider: ExecutionProvider
    passes: dict[str, dict[str, Any]]
    data_configs: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The id without the provider, as users name it; the precision for a user's own configuration."""
        return self.precision if self.id == OLIVE_CONFIG else self.id.partition("-")[2]

    @property
    def quantizes_at_once(self) -> bool:
        """Whether all weights are quantized at once, in memory: see infra/olive/streamed_quantization.py."""
        builder = next(iter(self.passes.values()))
        has_own_widths = "matmul_mixed_precision" in builder.get("extra_options", {})
        is_plain = (
            builder.get("algo_config", "default") == "default" and not builder.get("use_qdq") and not has_own_widths
        )
        return self.precision in BITS and not is_plain

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the recipe's canonical JSON: keys sorted, no spaces, without its id and the warnings.

        The passes keep their order in it, for another order is another model.
        """
        content = self.model_dump(mode="json", exclude={"id", "warnings"})
        content["passes"] = list(content["passes"].items())
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_recipe(name: str, execution_provider: str = "cpu") -> Recipe:
    """Return slmops' own recipe of a name: a precision for its default (`int4`), or `int4-block128` for another one.

    Raises `BadInput`, listing what is known, for a precision, a provider or a name without a recipe.
    """
    files = _recipe_files()
    precision = name.partition("-")[0]
    precisions = sorted({known_precision for _, known_precision in files})
    providers = sorted({provider for provider, _ in files})
    if precision not in precisions:
        raise BadInput(f"The precision {precision!r} is not known.", f"Known are: {', '.join(precisions)}.")
    if execution_provider not in providers:
        raise BadInput(
            f"The execution provider {execution_provider!r} is not known.", f"Known are: {', '.join(providers)}."
        )
    if (execution_provider, precision) not in files:
        fitting = ", ".join(sorted(p for provider, p in files if provider == execution_provider))
        raise BadInput(f"There is no {precision} for {execution_provider}.", f"It has: {fitting}.")
    known = known_recipes(precision, execution_provider)
    if name not in known:
        raise BadInput(f"There is no recipe {name!r} for {execution_provider}.", f"Known are: {', '.join(known)}.")
    path = files[execution_provider, precision][name]
    return Recipe.model_validate({**read_json(path), "id": path.stem})


def known_recipes(precision: str, execution_provider: str = "cpu") -> tuple[str, ...]:
    """Return the names of a precision's recipes for a provider, its default first; none where there is no recipe."""
    return tuple(sorted(_recipe_files().get((execution_provider, precision), ())))


def _recipe_files() -> dict[tuple[str, str], dict[str, Path]]:
    """Return provider and precision -> name -> file."""
    files: dict[tuple[str, str], dict[str, Path]] = {}
    for path in RECIPES_DIR.glob("*.json"):
        provider, _, name = path.stem.partition("-")
        files.setdefault((provider, name.partition("-")[0]), {})[name] = path
    return files


def olive_run_config(recipe: Recipe) -> dict[str, Any]:
    """Return the Olive run configuration of `recipe`, complete but for its paths (see infra.olive.engine.build)."""
    provider, device = OLIVE_PROVIDERS[recipe.execution_provider]
    return {
        "input_model": {"type": "HfModel", "task": "text-generation"},
        "systems": {
            "local_system": {
                "type": "LocalSystem",
                "accelerators": [{"device": device, "execution_providers": [provider]}],
            }
        },
        "host": "local_system",
        "target": "local_system",
        "data_configs": copy.deepcopy(list(recipe.data_configs)),
        "passes": copy.deepcopy(recipe.passes),
    }


def read_olive_config(path: Path) -> Recipe:
    """Return the recipe in a user's Olive configuration, in today's flat form or the older nested one.

    The model, the folders and the logging that it names are left to slmops. Raises `BadInput` naming everything in
    it that is unknown, or that slmops cannot honour.
    """
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"The Olive configuration {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise BadInput(f"The Olive configuration {path} is not valid JSON: {error}.") from error
    reader = _Reader()
    recipe = reader.recipe(config)
    if reader.faults or recipe is None:
        raise BadInput(
            f"The Olive configuration {path.name} cannot be used: {'; '.join(reader.faults)}.",
            "Correct or remove these entries.",
        )
    return recipe


class _Reader:
    """Reads an Olive configuration and collects all its faults before anything is refused."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def recipe(self, config: Any) -> Recipe | None:
        if not isinstance(config, dict):
            self.faults.append(f"it is a {type(config).__name__} where an object was expected")
            return None
        engine = self._section(config, "engine")
        merged = {**engine, **config}
        self._name_unknown("top-level key", merged, KNOWN_KEYS)
        self._check_input_model(self._flat(self._section(merged, "input_model"), "input_model"))
        provider = self._execution_provider(merged)
        data_configs = merged.get("data_configs", [])
        if not isinstance(data_configs, list) or not all(isinstance(entry, dict) for entry in data_configs):
            self.faults.append("data_configs is not a list of objects")
        passes = self._passes(merged, provider)
        if self.faults or not passes:
            return None
        precision = next(iter(passes.values()))["precision"]
        try:
            warnings = load_recipe(precision, provider).warnings
        except BadInput as error:
            self.faults.append(str(error).rstrip("."))
            return None
        return Recipe(
            precision=precision,
            execution_provider=TypeAdapter(ExecutionProvider).validate_python(provider),
            passes=passes,
            data_configs=tuple(data_configs),
            warnings=warnings,
        )

    def _section(self, config: dict[str, Any], key: str) -> dict[str, Any]:
        section = config.get(key) or {}
        if not isinstance(section, dict):
            self.faults.append(f"{key} is not an object")
            return {}
        return section

    def _flat(self, section: dict[str, Any], name: str) -> dict[str, Any]:
        """Merge the older form's nested `config` into the section; what is given twice is a fault."""
        nested = section.get("config") or {}
        if not isinstance(nested, dict):
            self.faults.append(f"{name}.config is not an object")
            nested = {}
        outer = {key: value for key, value in section.items() if key != "config"}
        self.faults += [f"{name} gives {key} twice" for key in sorted(outer.keys() & nested.keys())]
        return outer | nested

    def _name_unknown(self, what: str, section: dict[str, Any], known: frozenset[str] | set[str]) -> None:
        self.faults += [f"unknown {what} {key!r}" for key in section if key not in known]

    def _check_input_model(self, model: dict[str, Any]) -> None:
        self._name_unknown("key of input_model", model, INPUT_MODEL_KEYS)
        if str(model.get("type", "HfModel")).lower() != "hfmodel":
            self.faults.append(f"input_model is of type {model['type']!r} where HfModel was expected")
        if str(model.get("task", "text-generation")) not in ("text-generation", "text-generation-with-past"):
            self.faults.append(f"the task {model['task']!r} is not text-generation")

    def _execution_provider(self, config: dict[str, Any]) -> str:
        """Return the target's execution provider by slmops' name; cpu where none is named."""
        systems = self._section(config, "systems")
        for name in systems:
            self._check_system(name, self._flat(self._section(systems, name), f"the system {name}"))
        for role in ("host", "target"):
            named = config.get(role)
            if isinstance(named, str) and named not in systems:
                self.faults.append(f"{role} names the system {named!r}, which is not defined")
            elif named is not None and not isinstance(named, str | dict):
                self.faults.append(f"{role} is neither a system's name nor an object")
        target = config.get("target", config.get("host", next(iter(systems), None)))
        system = target if isinstance(target, dict) else systems.get(target) if isinstance(target, str) else None
        if isinstance(target, dict):
            self._check_system("target", self._flat(target, "target"))
        if not isinstance(system, dict):
            return "cpu"
        providers = [
            provider
            for accelerator in _dicts({**system, **_dict(system.get("config"))}.get("accelerators"))
            for provider in _list(accelerator.get("execution_providers"))
        ]
        by_olive_name = {olive_name: name for name, (olive_name, _) in OLIVE_PROVIDERS.items()}
        if not providers:
            return "cpu"
        if len(providers) > 1 or str(providers[0]) not in by_olive_name:
            known = ", ".join(by_olive_name)
            self.faults.append(f"execution_providers {providers!r} is not one of {known}")
            return "cpu"
        return by_olive_name[str(providers[0])]

    def _check_system(self, name: str, system: dict[str, Any]) -> None:
        self._name_unknown(f"key of the system {name}", system, SYSTEM_KEYS)
        if str(system.get("type", "LocalSystem")).lower() != "localsystem":
            self.faults.append(f"the system {name} is of type {system['type']!r} where LocalSystem was expected")
        for accelerator in _dicts(system.get("accelerators")):
            self._name_unknown(f"key of an accelerator of {name}", accelerator, ACCELERATOR_KEYS)

    def _passes(self, config: dict[str, Any], provider: str) -> dict[str, dict[str, Any]]:
        passes: dict[str, dict[str, Any]] = {}
        known = {name.lower(): name for name in olive_pass_types()}
        section = self._section(config, "passes")
        if not section:
            self.faults.append(f"it has no passes, where one of type {MODEL_BUILDER} was expected")
        for name, given in section.items():
            entry = given[0] if isinstance(given, list) and len(given) == 1 else given
            if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
                self.faults.append(f"the pass {name!r} is not an object with a type")
                continue
            pass_type = known.get(entry["type"].lower())
            if pass_type is None:
                self.faults.append(f"the pass {name!r} is of the unknown type {entry['type']!r}")
            elif pass_type == MODEL_BUILDER:
                passes[name] = self._builder(name, entry, provider)
            else:
                passes[name] = {**entry, "type": pass_type}
        builders = [name for name, entry in passes.items() if entry["type"] == MODEL_BUILDER]
        if not self.faults and builders != list(passes)[:1]:
            self.faults.append(f"exactly one pass must be of type {MODEL_BUILDER}, and it must be the first")
        return passes

    def _builder(self, name: str, entry: dict[str, Any], provider: str) -> dict[str, Any]:
        given = self._flat(entry, f"the pass {name}")
        given |= self._quantization(name, given)
        options: dict[str, Any] = {"type": MODEL_BUILDER, "execution_provider": provider}
        for key, value in given.items():
            option = OPTION_ALIASES.get(key, key)
            if key in ("type", "quantization_config"):
                continue
            if option not in BUILDER_OPTIONS or option == "execution_provider":
                self.faults.append(f"unknown key {key!r} of the pass {name!r} of type {MODEL_BUILDER}")
            elif option in options:
                self.faults.append(f"the pass {name!r} gives {option} twice")
            elif value is not None:
                options[option] = value
                self._check_option(name, key, BUILDER_OPTIONS[option].type, value)
        if options.get("precision") is None:
            self.faults.append(f"the pass {name!r} names no precision")
        for key in _dict(options.get("extra_options")):
            if key not in EXTRA_OPTIONS:
                self.faults.append(f"unknown key {key!r} of extra_options of the pass {name!r}")
        return options

    def _quantization(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        section = given.get("quantization_config") or {}
        if not isinstance(section, dict):
            self.faults.append(f"quantization_config of the pass {name!r} is not an object")
            return {}
        self.faults += [f"the pass {name!r} gives {key} twice" for key in sorted(section.keys() & given.keys())]
        return section

    def _check_option(self, name: str, key: str, expected: Any, value: Any) -> None:
        if key == "precision":
            expected = Precision
        try:
            TypeAdapter(expected).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            self.faults.append(f"{key} {value!r} of the pass {name!r} is not valid ({reason})")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in _list(value) if isinstance(entry, dict)]


class BuiltVariant(BaseModel):
    """A variant whose files are in the store, and what its build took: wall time in s, peak memory in bytes.

    `passes` are the recipe's, as Olive was told them: the manifest has only their digest. `host` is the machine, where
    another one built it.
    """

    model_config = ConfigDict(frozen=True)

    variant: StoredVariant
    wall_s: float
    peak_rss_bytes: int
    log: str
    warnings: tuple[str, ...] = ()
    passes: dict[str, dict[str, Any]] = {}
    host: dict[str, Any] | None = None


def plan_recipes(request: DeployRequest) -> list[Recipe]:
    """Return one recipe per precision, or the one that the user's Olive configuration makes.

    Raises `BadInput` for a named recipe that is unknown, of a precision that is not asked for, or the second of one.
    """
    if request.olive_config_file:
        return [read_olive_config(Path(request.olive_config_file).expanduser())]
    named = _named_recipes(request)
    return [
        named.get(precision) or load_recipe(precision, request.execution_provider) for precision in request.precisions
    ]


def plan_search(request: DeployRequest) -> list[Recipe]:
    """Return every recipe of each precision that is asked for, the default first.

    A precision whose recipe is named keeps that one, and is not searched. Raises `BadInput` as `plan_recipes` does.
    """
    named = _named_recipes(request)
    provider = request.execution_provider
    return [
        recipe
        for precision in request.precisions
        for recipe in (
            [named[precision]]
            if precision in named
            # Without any recipe, the default's absence is the error to tell.
            else [load_recipe(name, provider) for name in known_recipes(precision, provider) or (precision,)]
        )
    ]


def _named_recipes(request: DeployRequest) -> dict[str, Recipe]:
    named: dict[str, Recipe] = {}
    for name in request.recipes:
        recipe = load_recipe(name, request.execution_provider)
        if recipe.precision not in request.precisions:
            fitting = [
                one for precision in request.precisions for one in known_recipes(precision, recipe.execution_provider)
            ]
            raise BadInput(
                f"The recipe {name!r} is of a precision that is not asked for.",
                f"Ask for {recipe.precision} too, or use one of: {', '.join(fitting)}.",
            )
        if recipe.precision in named:
            known = ", ".join(known_recipes(recipe.precision, recipe.execution_provider))
            raise BadInput(
                f"The recipes {named[recipe.precision].name!r} and {name!r} are of one precision.",
                f"A version has one variant a precision: name one of {known}, or search for the best of them.",
            )
        named[recipe.precision] = recipe
    return named


# A tag is what Prefect can limit, and it costs each run a question to the server: only builds take so much memory that
# a machine may want a limit.
@stage("build variant", run_name="build-{recipe.name}", tags=["slmops-build"])
def build_variant(
    recipe: Recipe,
    prepared: PreparedCheckpoint,
    request: DeployRequest,
    registry: ModelRegistry,
    settings: Settings,
    torch_child: ChildProcess,
) -> BuiltVariant:
    """Build one variant within a `torch_process` and store its files; a build that is stored already is reused.

    Raises `StageFailed` and its kinds as `run_in_child` does.
    """
    key = digest_of(
        {
            "source": prepared.digest,
            "recipe": recipe.digest,
            "builder": builder_versions(),
            "generation": request.generation_defaults,
            "device": request.device,
        }
    )
    record = settings.cache_dir / "builds" / f"{key}.json"
    with stage_progress(f"build {recipe.name}") as on_progress:
        if record.is_file():
            built = BuiltVariant.model_validate_json(record.read_bytes())
            if not registry.claim_files(built.variant.files):
                on_progress(1, 1, "built before")
                return built
        log = settings.cache_dir / "logs" / f"build-{request.name}-{recipe.name}-{key[:12]}.log"
        log.unlink(missing_ok=True)
        slots = settings.cache_dir / "build-slots"
        with slot(slots, settings.worker.builds, on_progress), work_folder(settings) as work:
            child = torch_child.run(
                Build(
                    olive_config=olive_run_config(recipe),
                    checkpoint_dir=prepared.folder,
                    output_dir=work / "model",
                    cache_dir=work / "cache",
                    threads=settings.threads,
                ),
                deadline_s=settings.timeout.build_s,
                log_path=log,
                work_dir=work,
                on_progress=on_progress,
            )
            set_generation_defaults(work / "model", request.generation_defaults)
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
            warnings=(*recipe.warnings, *child.value.warnings),
            passes=recipe.passes,
        )
        write_whole(record, built.model_dump_json(indent=2))
    return built


def refuse_recipes(request: DeployRequest) -> None:
    """Raise `BadInput` for recipes where there is nothing to build: the model came as ONNX."""
    if request.recipes or request.search or request.olive_config_file:
        raise BadInput(
            f"{request.checkpoint} is built already.",
            "Leave --recipe, --search and --olive-config out, or deploy its checkpoint.",
        )


@stage("take model", run_name="take-{request.name}")
def take_model(
    prepared: PreparedCheckpoint, request: DeployRequest, registry: ModelRegistry, settings: Settings
) -> BuiltVariant:
    """Store a folder that already is an onnxruntime-genai model, as the one variant of its version."""
    refuse_recipes(request)
    precision = detect_precision(prepared.folder)
    with stage_progress(f"take {precision}") as on_progress, work_folder(settings) as work:
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
            files=registry.add_files(model, on_progress),
        )
    return BuiltVariant(variant=variant, wall_s=0.0, peak_rss_bytes=0, log="")


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
    path.unlink()  # it may be a link to the user's own file
    path.write_text(json.dumps({**config, "search": search}, indent=4), "utf-8")


@stage("copy out", run_name="copy-out")
def copy_out(variants: Sequence[StoredVariant], output: str, registry: ModelRegistry) -> None:
    """Write a plain copy of every variant into a new folder, one folder a precision."""
    target = Path(output).expanduser().absolute()
    check_output(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        for variant in variants:
            registry.copy_files(variant.files, aside / variant.precision)
        if target.is_dir():
            target.rmdir()
        place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
