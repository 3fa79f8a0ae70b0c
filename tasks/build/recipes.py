"""Recipes: Olive's configuration for a precision on an execution provider."""

import hashlib
import json
from pathlib import Path

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.errors import BadInput
from slmops.infra.olive.options import BITS
from slmops.infra.records import Json, Record
from slmops.tasks.request.parameters import ExecutionProvider, Precision

# Each file is a recipe: PROVIDER-PRECISION.json is the default, PROVIDER-PRECISION-NAME.json is another one.
RECIPES_DIR = Path(__file__).parent / "recipes"
MODEL_BUILDER = "ModelBuilder"
CALIBRATED_PASSES = frozenset({"AutoClip", "Gptq", "SelectiveMixedPrecision"})
OLIVE_CONFIG = "olive-config"  # the id of a recipe from a user's Olive configuration


class Recipe(Record):
    """The recipe of one variant.

    `passes` are Olive's passes by name, in order, one of type ModelBuilder; `warnings` are for the user. `id` names the
    origin, such as `cpu-int4-block128`. `climbs_to` names recipes of higher fidelity, the nearest in size first, for a
    variant that misses the gate; `fallback` names one for checkpoints that its passes cannot handle, `same_as` one that
    gives the same model.
    """

    id: str = OLIVE_CONFIG
    precision: Precision
    execution_provider: ExecutionProvider
    passes: dict[str, Json]
    data_configs: tuple[Json, ...] = ()
    warnings: tuple[str, ...] = ()
    climbs_to: tuple[str, ...] = ()
    fallback: str | None = None
    same_as: str | None = None

    @property
    def name(self) -> str:
        """The id without the provider, as users write it; for a user's own configuration, the precision."""
        return self.precision if self.id == OLIVE_CONFIG else self.id.partition("-")[2]

    @property
    def builder(self) -> Json:
        """The pass of type ModelBuilder."""
        return next(entry for entry in self.passes.values() if entry["type"] == MODEL_BUILDER)

    @property
    def is_calibrated(self) -> bool:
        """Whether a pass uses texts: see `slmops.tasks.build.calibration`."""
        return any(entry["type"] in CALIBRATED_PASSES for entry in self.passes.values())

    @property
    def quantizes_at_once(self) -> bool:
        """Whether all weights are quantized at once, in memory: see infra/olive/streamed_quantization.py."""
        builder = self.builder
        extra = builder.get("extra_options")
        has_own_widths = isinstance(extra, dict) and "matmul_mixed_precision" in extra
        is_plain = (
            builder.get("algo_config", "default") == "default" and not builder.get("use_qdq") and not has_own_widths
        )
        return self.precision in BITS and not is_plain

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the recipe's canonical JSON: keys sorted, no spaces, only fields that change the model.

        It depends on the order of the passes, because another order gives another model.
        """
        content = self.model_dump(mode="json", exclude={"id", "warnings", "climbs_to", "fallback", "same_as"})
        content["passes"] = list(content["passes"].items())
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_recipe(name: str, execution_provider: str = "cpu") -> Recipe:
    """Return slmops' own recipe of a name: a precision for its default (`int4`), or a name such as `int4-block128`.

    Raises `BadInput`, which lists the known ones, for a precision, a provider or a name without a recipe.
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
        raise BadInput(
            f"There is no {precision} for {execution_provider}.", f"It has: {fitting}.", code="recipe-missing"
        )
    known = known_recipes(precision, execution_provider)
    if name not in known:
        raise BadInput(
            f"There is no recipe {name!r} for {execution_provider}.",
            f"Known are: {', '.join(known)}.",
            code="recipe-unknown",
        )
    path = files[execution_provider, precision][name]
    return Recipe.model_validate({**read_json(path), "id": path.stem})


def ladder_of(precision: str, execution_provider: str = "cpu") -> tuple[Recipe, ...]:
    """Return a precision's default recipe and those that a deploy tries after it; empty for one without recipes."""
    if not known_recipes(precision, execution_provider):
        return ()
    default = load_recipe(precision, execution_provider)
    return (default, *(load_recipe(name, execution_provider) for name in default.climbs_to))


def known_recipes(precision: str, execution_provider: str = "cpu") -> tuple[str, ...]:
    """Return the names of a precision's recipes for a provider, the default first."""
    return tuple(sorted(_recipe_files().get((execution_provider, precision), ())))


def _recipe_files() -> dict[tuple[str, str], dict[str, Path]]:
    """Return provider and precision -> name -> file."""
    files: dict[tuple[str, str], dict[str, Path]] = {}
    for path in RECIPES_DIR.glob("*.json"):
        provider, _, name = path.stem.partition("-")
        files.setdefault((provider, name.partition("-")[0]), {})[name] = path
    return files
