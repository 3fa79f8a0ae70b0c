"""The recipes of a deploy: the defaults, the named ones, those of a search, or the user's own."""

from pathlib import Path

from slmops.infra.errors import BadInput
from slmops.tasks.build.olive_config import read_olive_config
from slmops.tasks.build.recipes import Recipe, known_recipes, load_recipe
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.request.parameters import PRECISIONS, Precision

# The recipe of a precision whose passes do nothing to weights that are quantized already; lm_head is, in eight bits.
ROUNDED: dict[str, str] = {"int4": "int4-int8-head"}


def plan_recipes(request: DeployRequest) -> list[Recipe]:
    """Return one recipe per precision, or the one from the user's Olive configuration.

    Raises `BadInput` for a named recipe that is unknown, of a precision that is not requested, or the second of one.
    """
    if request.olive_config_file:
        return [read_olive_config(Path(request.olive_config_file).expanduser())]
    named = _named_recipes(request)
    return [
        named.get(precision) or load_recipe(precision, request.execution_provider) for precision in request.precisions
    ]


def plan_search(request: DeployRequest) -> list[Recipe]:
    """Return every recipe of each requested precision, the default first.

    A precision with a named recipe keeps it, and is not searched. A recipe that gives the same model as another is left
    out. Raises `BadInput` as `plan_recipes` does.
    """
    named = _named_recipes(request)
    provider = request.execution_provider
    return [
        recipe
        for precision in request.precisions
        for recipe in (
            [named[precision]]
            if precision in named
            # Without any recipe, report the missing default.
            else [load_recipe(name, provider) for name in known_recipes(precision, provider) or (precision,)]
        )
        if precision in named or recipe.same_as is None
    ]


def _named_recipes(request: DeployRequest) -> dict[str, Recipe]:
    named: dict[str, Recipe] = {}
    for name in request.recipes:
        recipe = load_recipe(name, request.execution_provider)
        if recipe.precision not in request.precisions:
            fitting = [
                known
                for precision in request.precisions
                for known in known_recipes(precision, recipe.execution_provider)
            ]
            raise BadInput(
                f"The recipe {name!r} is of a precision that is not requested.",
                f"Request {recipe.precision} too, or use one of: {', '.join(fitting)}.",
            )
        if recipe.precision in named:
            known = ", ".join(known_recipes(recipe.precision, recipe.execution_provider))
            raise BadInput(
                f"The recipes {named[recipe.precision].name!r} and {name!r} are of one precision.",
                f"A version has one variant per precision: name one of {known}, or search for the best of them.",
            )
        named[recipe.precision] = recipe
    return named


def fitting_recipes(recipes: list[Recipe], request: DeployRequest, quantized: Precision | None) -> list[Recipe]:
    """Return the recipes for a checkpoint, of which one that is `quantized` already has a single one.

    Raises `BadInput` for a quantized checkpoint and any other precision or recipe; every precision together, which is
    the default, means its own.
    """
    if quantized is None:
        return recipes
    refuse_recipes(request)
    if request.precisions != (quantized,) and {*request.precisions} != {*PRECISIONS}:
        others = ", ".join(precision for precision in request.precisions if precision != quantized)
        raise BadInput(
            f"{request.checkpoint} is quantized already, and can be built at {quantized} only, not at {others}.",
            f"Give --precision {quantized}, or the checkpoint in floating point.",
            code="checkpoint-quantized",
        )
    on_cpu = request.execution_provider == "cpu" and quantized in ROUNDED
    return [load_recipe(ROUNDED[quantized] if on_cpu else quantized, request.execution_provider)]


def refuse_recipes(request: DeployRequest) -> None:
    """Raise `BadInput` for recipes if there is nothing to build, because the model came as ONNX."""
    if request.recipes or request.search or request.olive_config_file:
        raise BadInput(
            f"{request.checkpoint} is quantized or an ONNX model already.",
            "Omit --recipe, --search and --olive-config, or deploy the checkpoint in floating point.",
            code="checkpoint-is-built",
        )
