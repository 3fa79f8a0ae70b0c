"""Building all variants of a version: by a search, on the workers of a pool, or on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slmops.infra.errors import StageFailed
from slmops.infra.records import Record
from slmops.tasks.build.build import BuiltVariant, build_variant
from slmops.tasks.build.calibration import Calibration, as_one, calibration_for
from slmops.tasks.build.given import take_model
from slmops.tasks.build.olive_config import ordered_recipe
from slmops.tasks.build.recipes import Recipe
from slmops.tasks.build.search import SearchOutcome, search_recipes
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint, fetched_from_store, put_into_store
from slmops.tasks.environment.checks import check_room
from slmops.tasks.environment.host import builder_versions, host_facts
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.orders import Order, order_on_pool
from slmops.tasks.workshop import workshop

ON_WORKER = "build-variant"  # the flow that builds on a pool's workers
# The fields of a request that a build needs; files and addresses of the deploying machine are not sent.
OF_A_BUILD = {
    "name",
    "precisions",
    "device",
    "execution_provider",
    "max_length",
    "temperature",
    "top_p",
    "repetition_penalty",
}


class BuildOrder(Record):
    """An order from one machine's deploy to another.

    It has the checkpoint's address in the store, and the builder's versions. With equal versions the worker's result is
    that of a build by the deploy itself.
    """

    checkpoint: str
    digest: str
    builder: dict[str, str]
    request: dict[str, Any]
    recipe: dict[str, Any]
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Built:
    """The built variants, the errors of others by precision, and the search that they come from."""

    variants: list[BuiltVariant] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    search: SearchOutcome | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """The builds' warnings for the user."""
        return tuple(text for built in self.variants for text in built.warnings)


def build_each(
    request: DeployRequest, recipes: Sequence[Recipe], prepared: PreparedCheckpoint, evaluation: EvaluationSet
) -> Built:
    """Build every variant; if one fails, its reason is reported and the others continue.

    Raises `BadInput` for recipes of a model that is built already.
    """
    if request.search:
        variants, outcome = search_recipes(request, prepared, evaluation)
        return Built(variants, outcome.failures, outcome)
    if prepared.inspection.kind == "genai":
        return Built([take_model(prepared, request)])
    try:
        calibration = calibration_for(recipes, request, prepared, evaluation.rows)
    except StageFailed as error:  # others can be built without
        built = build_each(request, [recipe for recipe in recipes if not recipe.is_calibrated], prepared, evaluation)
        return replace(built, errors={**built.errors, **_of_calibrated(recipes, str(error))})
    if pool := workshop().build_pool:
        return _build_on_workers(request, recipes, prepared, pool, calibration)
    built = Built()
    for recipe in recipes:
        try:
            built.variants.append(build_variant(recipe, prepared, request, as_one(calibration)))
        except StageFailed as error:
            built.errors[recipe.precision] = str(error)
    return built


def _of_calibrated(recipes: Sequence[Recipe], error: str) -> dict[str, str]:
    return {recipe.precision: error for recipe in recipes if recipe.is_calibrated}


def _build_on_workers(
    request: DeployRequest,
    recipes: Sequence[Recipe],
    prepared: PreparedCheckpoint,
    pool: str,
    calibration: Calibration | None,
) -> Built:
    registry = workshop().registry
    checkpoint = put_into_store(prepared, registry)
    wanted = {**request.given(OF_A_BUILD), "checkpoint": checkpoint}
    orders: dict[str, Order] = {}
    for recipe in recipes:
        asked = BuildOrder(
            checkpoint=checkpoint,
            digest=prepared.digest,
            builder=builder_versions(),
            request=wanted,
            recipe=recipe.model_dump(mode="json"),
            calibration=calibration if recipe.is_calibrated else None,
        )
        parameters = {"name": request.name, "recipe": recipe.name}
        orders[recipe.precision] = Order(f"build-{request.name}-{recipe.name}", parameters, asked)
    handed_back = order_on_pool(ON_WORKER, pool, orders)
    results = [handed_back.results[precision] for precision in orders if precision in handed_back.results]
    variants = [BuiltVariant.model_validate(result) for result in results]
    if registry.claim_files(file for built in variants for file in built.variant.files):
        raise StageFailed("The store lost files of a variant before its version was complete.", "Deploy again.")
    return Built(variants, handed_back.errors)


def build_ordered(asked: BuildOrder) -> BuiltVariant:
    """Build the variant that a deploy on another machine ordered.

    Raises `StageFailed` if this machine has other versions of the builder, and `BadInput` as `ordered_recipe` does.
    """
    _check_builder(asked.builder)
    settings, recipe = workshop().settings, ordered_recipe(asked.recipe)
    prepared = fetched_from_store(asked.checkpoint, asked.digest, settings)
    whole_model = [recipe.precision] if recipe.quantizes_at_once else []
    calibrated = [recipe.precision] if recipe.is_calibrated else []
    check_room(prepared.inspection, [recipe.precision], 0, settings, whole_model=whole_model, calibrated=calibrated)
    built = build_variant(recipe, prepared, DeployRequest.of(asked.request), as_one(asked.calibration))
    return built.model_copy(update={"host": host_facts()})


def _check_builder(wanted: dict[str, str]) -> None:
    here = builder_versions()
    other = [
        f"{name} {here.get(name)} (wanted: {number})" for name, number in wanted.items() if here.get(name) != number
    ]
    if other:
        raise StageFailed(
            f"This worker's builder differs from the deploy's: {', '.join(other)}.",
            "Install the same constraints.txt on every machine.",
            code="builder-of-other-versions",
        )
