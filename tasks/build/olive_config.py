"""Olive's run configuration, written for a recipe or read from a user's file."""

import copy
import json
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import read_text
from slmops.infra.olive.options import (
    BUILDER_OPTIONS,
    BUILDER_QUANTIZATION_OPTIONS,
    EXTRA_OPTIONS,
    olive_pass_types,
)
from slmops.infra.records import Json
from slmops.tasks.build.recipes import MODEL_BUILDER, OLIVE_CONFIG, Recipe, load_recipe
from slmops.tasks.request.parameters import ExecutionProvider, Precision

# Passes that turn a Hugging Face checkpoint into another one, and so may come before the ModelBuilder.
BEFORE_BUILDER = frozenset({"AutoClip", "Gptq", "KQuant", "QuaRot", "Rtn", "SelectiveMixedPrecision"})
# Olive's names of the execution providers, and the device of each in Olive's systems.
OLIVE_PROVIDERS: dict[str, tuple[str, str]] = {
    "cpu": ("CPUExecutionProvider", "cpu"),
    "cuda": ("CUDAExecutionProvider", "gpu"),
    "dml": ("DmlExecutionProvider", "gpu"),
    "webgpu": ("WebGpuExecutionProvider", "gpu"),
}

# Keys of an Olive file for its paths, logs and evaluation: slmops sets these itself, and they do not change the model.
IGNORED_KEYS = frozenset(
    {
        "cache_dir",
        "clean_cache",
        "clean_evaluation_cache",
        "evaluate_input_model",
        "evaluator",
        "evaluators",
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
INPUT_MODEL_KEYS = frozenset({"type", "model_path", "task", "load_kwargs"})
LOAD_KEYS = frozenset({"torch_dtype"})  # a checkpoint is loaded in its own dtype
SYSTEM_KEYS = frozenset({"type", "accelerators"})
ACCELERATOR_KEYS = frozenset({"device", "execution_providers"})

# Keys that make Olive run foreign code, in a pass or in a data configuration. A user's own file may have them.
CODE_KEYS = frozenset({"script_dir", "trust_remote_code", "user_script"})

# The pass's options under their present and former names in Olive's own ModelBuilder.
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


MOVED_OPTIONS = frozenset(BUILDER_QUANTIZATION_OPTIONS)


def olive_run_config(recipe: Recipe) -> Json:
    """Return the Olive run configuration of `recipe`, complete except for its paths (see infra.olive.engine.build)."""
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
        "data_configs": [*copy.deepcopy(recipe.data_configs)],
        "passes": {**copy.deepcopy(recipe.passes)},
    }


def read_olive_config(path: Path) -> Recipe:
    """Return the recipe in a user's Olive configuration, in the present flat form or the older nested form.

    slmops sets the model, the folders and the logging itself. Raises `BadInput` that names every entry which is unknown
    or not supported.
    """
    try:
        config = json.loads(read_text(path))
    except OSError as error:
        raise BadInput(
            f"The Olive configuration {path} cannot be read: {error.strerror}.", code="olive-config-unreadable"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"The Olive configuration {path} is not valid JSON: {error}.",
            "Correct the file.",
            code="olive-config-not-json",
        ) from error
    reader = _Reader()
    recipe = reader.recipe(config)
    if reader.faults or recipe is None:
        raise BadInput(
            f"The Olive configuration {path.name} cannot be used: {'; '.join(reader.faults)}.",
            "Correct or remove these entries.",
            code="olive-config-not-valid",
        )
    return recipe


def ordered_recipe(record: Json) -> Recipe:
    """Return the recipe that a deploy on another machine ordered: one of slmops' own, or one from a user's file.

    Raises `BadInput` for anything else, and for one that names code.
    """
    recipe = Recipe.model_validate(record)
    if recipe.id != OLIVE_CONFIG and recipe.digest == load_recipe(recipe.name, recipe.execution_provider).digest:
        return recipe
    config = olive_run_config(recipe)
    for entry in _dict(config["passes"]).values():
        _dict(entry).pop("execution_provider", None)  # of the target; the reader sets it itself
    reader = _Reader()
    reader.recipe(config)
    faults = [*reader.faults, *(f"{key} names code" for key in sorted(_keys(config) & CODE_KEYS))]
    if faults:
        raise BadInput(
            f"The order's recipe is refused: {'; '.join(faults)}.",
            "Deploy such a model on this machine.",
            code="olive-config-refused",
        )
    return recipe


class _Reader:
    """Reads an Olive configuration and collects all its faults before anything is refused."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def recipe(self, config: JsonValue) -> Recipe | None:
        if not isinstance(config, dict):
            self.faults.append(f"it is a {type(config).__name__}; an object was expected")
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
        precision = str(next(entry for entry in passes.values() if entry["type"] == MODEL_BUILDER)["precision"])
        try:
            warnings = load_recipe(precision, provider).warnings
        except BadInput as error:
            self.faults.append(str(error).rstrip("."))
            return None
        return Recipe(
            precision=precision,
            execution_provider=TypeAdapter(ExecutionProvider).validate_python(provider),
            passes=passes,
            data_configs=tuple(_dicts(data_configs)),
            warnings=warnings,
        )

    def _section(self, config: Json, key: str) -> Json:
        section = config.get(key) or {}
        if not isinstance(section, dict):
            self.faults.append(f"{key} is not an object")
            return {}
        return section

    def _flat(self, section: Json, name: str) -> Json:
        """Merge the older form's nested `config` into the section; a key that is given twice is a fault."""
        nested = section.get("config") or {}
        if not isinstance(nested, dict):
            self.faults.append(f"{name}.config is not an object")
            nested = {}
        outer = {key: value for key, value in section.items() if key != "config"}
        self.faults += [f"{name} gives {key} twice" for key in sorted(outer.keys() & nested.keys())]
        return outer | nested

    def _name_unknown(self, what: str, section: Json, known: frozenset[str] | set[str]) -> None:
        self.faults += [f"unknown {what} {key!r}" for key in section if key not in known]

    def _check_input_model(self, model: Json) -> None:
        self._name_unknown("key of input_model", model, INPUT_MODEL_KEYS)
        self._name_unknown("key of load_kwargs", self._section(model, "load_kwargs"), LOAD_KEYS)
        if str(model.get("type", "HfModel")).lower() != "hfmodel":
            self.faults.append(f"input_model is of type {model['type']!r}; HfModel was expected")
        if str(model.get("task", "text-generation")) not in ("text-generation", "text-generation-with-past"):
            self.faults.append(f"the task {model['task']!r} is not text-generation")

    def _execution_provider(self, config: Json) -> str:
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

    def _check_system(self, name: str, system: Json) -> None:
        self._name_unknown(f"key of the system {name}", system, SYSTEM_KEYS)
        if str(system.get("type", "LocalSystem")).lower() != "localsystem":
            self.faults.append(f"the system {name} is of type {system['type']!r}; LocalSystem was expected")
        for accelerator in _dicts(system.get("accelerators")):
            self._name_unknown(f"key of an accelerator of {name}", accelerator, ACCELERATOR_KEYS)

    def _passes(self, config: Json, provider: str) -> dict[str, Json]:
        passes: dict[str, Json] = {}
        known = {name.lower(): name for name in olive_pass_types()}
        section = self._section(config, "passes")
        if not section:
            self.faults.append(f"it has no passes; one of type {MODEL_BUILDER} was expected")
        for name, given in section.items():
            entry = given[0] if isinstance(given, list) and len(given) == 1 else given
            if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
                self.faults.append(f"the pass {name!r} is not an object with a type")
                continue
            pass_type = known.get(str(entry["type"]).lower())
            if pass_type is None:
                self.faults.append(f"the pass {name!r} is of the unknown type {entry['type']!r}")
            elif pass_type == MODEL_BUILDER:
                passes[name] = self._builder(name, entry, provider)
            else:
                passes[name] = {**entry, "type": pass_type}
        if not self.faults:
            self._check_order(passes)
        return passes

    def _check_order(self, passes: dict[str, Json]) -> None:
        types = {name: str(entry["type"]) for name, entry in passes.items()}
        builders = [name for name, pass_type in types.items() if pass_type == MODEL_BUILDER]
        if len(builders) != 1:
            self.faults.append(f"exactly one pass must be of type {MODEL_BUILDER}, found {len(builders)}")
            return
        before = list(types)[: list(types).index(builders[0])]
        self.faults += [
            f"the pass {name!r} of type {types[name]} comes before {MODEL_BUILDER}, where only "
            f"{', '.join(sorted(BEFORE_BUILDER))} may"
            for name in before
            if types[name] not in BEFORE_BUILDER
        ]

    def _builder(self, name: str, entry: Json, provider: str) -> Json:
        given = self._flat(entry, f"the pass {name}")
        given |= self._quantization(name, given)
        given = self._with_options_of_its_own(name, given)
        options: Json = {"type": MODEL_BUILDER, "execution_provider": provider}
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

    def _with_options_of_its_own(self, name: str, given: Json) -> Json:
        """Move the options that Olive's pass has under other names out of extra_options, where its users write them."""
        extra = given.get("extra_options")
        if not isinstance(extra, dict):
            return given
        moved = {key: value for key, value in extra.items() if OPTION_ALIASES.get(key, key) in MOVED_OPTIONS}
        self.faults += [f"the pass {name!r} gives {key} twice" for key in sorted(moved.keys() & given.keys())]
        numbers = {key: int(value) for key, value in moved.items() if isinstance(value, str) and value.isdecimal()}
        rest = {key: value for key, value in extra.items() if key not in moved}
        return {**given, **moved, **numbers, "extra_options": rest or None}

    def _quantization(self, name: str, given: Json) -> Json:
        section = given.get("quantization_config") or {}
        if not isinstance(section, dict):
            self.faults.append(f"quantization_config of the pass {name!r} is not an object")
            return {}
        self.faults += [f"the pass {name!r} gives {key} twice" for key in sorted(section.keys() & given.keys())]
        return section

    def _check_option(self, name: str, key: str, expected: Any, value: JsonValue) -> None:
        if key == "precision":
            expected = Precision
        try:
            TypeAdapter(expected).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            self.faults.append(f"{key} {value!r} of the pass {name!r} is not valid ({reason})")


def _keys(value: JsonValue) -> set[str]:
    """Return the keys of a JSON value at any depth."""
    inner = [*value.values()] if isinstance(value, dict) else _list(value)
    return {str(key) for key in _dict(value)}.union(*map(_keys, inner))


def _dict(value: JsonValue) -> Json:
    return value if isinstance(value, dict) else {}


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def _dicts(value: JsonValue) -> list[Json]:
    return [entry for entry in _list(value) if isinstance(entry, dict)]
