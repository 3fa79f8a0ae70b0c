"""The flows `build-variant` and `measure-variant`: a deploy's heavy stages, on any worker of a pool.

All that moves goes through the store: the checkpoint as an input, variants as blobs, figures as evidence, and what is
asked and handed back as an order (`slmops.infra.storage.orders`).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict

from slmops.infra.errors import StageFailed
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.orders import forget_order, give_order, hand_back, read_order, take_back
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.build.build import BuiltVariant, build_variant
from slmops.tasks.build.olive_config import ordered_recipe
from slmops.tasks.build.recipes import Recipe
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint, fetched_from_store, put_into_store
from slmops.tasks.environment.checks import check_room
from slmops.tasks.environment.host import builder_versions, host_facts
from slmops.tasks.exams.endurance import EnduranceExam, Exercise
from slmops.tasks.exams.exam import examine
from slmops.tasks.exams.measurement import Measurement, MeasurementExam
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.dispatch import Job, check_pool, run_on_pool
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.workshop import open_workshop, workshop

BUILD = "build-variant"
MEASURE = "measure-variant"


class Examined(BaseModel):
    """What a worker measured of a variant, or why it could not."""

    model_config = ConfigDict(frozen=True)

    measurement: Measurement | None = None
    exercises: tuple[Exercise, ...] = ()
    error: str | None = None

    @property
    def measured(self) -> Measurement:
        """The figures; raises `StageFailed` where there are none."""
        if self.measurement is None:
            raise StageFailed(self.error or "It was not measured.")
        return self.measurement


@flow(name=BUILD)
@ends_by_its_errors
@open_workshop()
def build_variant_on_worker(name: str, recipe: str, order: str) -> None:
    """Build one variant of a deploy that runs elsewhere. Started by `deploy` when SLMOPS_WORKER__POOL is set.

    Args:
        name: Name of the model.
        recipe: Recipe that it is built by.
        order: Id of the order in the store, which says the rest.
    """
    shop = workshop()
    settings, registry = shop.settings, shop.registry
    asked = read_order(registry, order)
    _check_builder(asked["builder"])
    prepared = fetched_from_store(asked["checkpoint"], asked["digest"], settings)
    wanted = ordered_recipe(asked["recipe"])
    whole_model = [wanted.precision] if wanted.quantizes_at_once else []
    check_room(prepared.inspection, [wanted.precision], 0, settings, whole_model=whole_model)
    request = DeployRequest.of(asked["request"])
    built = build_variant(wanted, prepared, request, registry, settings, shop.torch)
    done = built.model_copy(update={"host": host_facts()})
    hand_back(registry, order, flow_run.id, done.model_dump(mode="json"))


@flow(name=MEASURE)
@ends_by_its_errors
@open_workshop()
def measure_variant_on_worker(reference: str, precision: str, order: str) -> None:
    """Measure and exercise one variant of a stored version on this device. Started by `deploy`.

    Args:
        reference: The version, NAME@VERSION.
        precision: Which of its variants.
        order: Id of the order in the store, which says the rest.
    """
    registry = workshop().registry
    rows = [EvaluationRow.model_validate(row) for row in read_order(registry, order)["rows"]]
    version = registry.find(reference)
    variant = version.variant(precision)
    with version.in_use():
        done = Examined(
            measurement=examine(MeasurementExam(), variant),
            exercises=(
                examine(EnduranceExam("genai", rows), variant),
                examine(EnduranceExam("foundry", rows), variant),
            ),
        )
    hand_back(registry, order, flow_run.id, done.model_dump(mode="json"))


def check_workers(settings: Settings) -> None:
    """Raise `BadInput` for pools that the settings name and that could not do the work now."""
    if settings.worker.pool:
        check_pool(settings.worker.pool, [BUILD])
        check_pool(settings.worker.measure_pool or settings.worker.pool, [MEASURE])


def build_on_workers(
    request: DeployRequest,
    recipes: Sequence[Recipe],
    prepared: PreparedCheckpoint,
    registry: ModelRegistry,
    settings: Settings,
) -> tuple[list[BuiltVariant], dict[str, str]]:
    """Build every variant on a worker of the pool; returns what was built, and why (by precision) what was not."""
    assert settings.worker.pool
    checkpoint = put_into_store(prepared, registry)
    common = {
        "checkpoint": checkpoint,
        "digest": prepared.digest,
        "builder": builder_versions(),
        "request": {
            **request.given(OF_A_BUILD),
            "checkpoint": checkpoint,
        },
    }
    orders: dict[str, dict[str, Any]] = {
        one.precision: {**common, "recipe": one.model_dump(mode="json")} for one in recipes
    }
    names: dict[str, str] = {one.precision: one.name for one in recipes}
    with _ordered(registry, orders) as ids:
        jobs = {
            precision: Job(
                f"build-{request.name}-{names[precision]}",
                {"name": request.name, "recipe": names[precision], "order": ids[precision]},
            )
            for precision in orders
        }
        results, failures = _results(BUILD, settings.worker.pool, jobs, ids, registry, settings)
    built = [BuiltVariant.model_validate(results[one.precision]) for one in recipes if one.precision in results]
    if registry.claim_files(file for one in built for file in one.variant.files):
        raise StageFailed("The store lost files of a variant before its version was complete.", "Deploy again.")
    return built, failures


# What a build needs of a request: files and addresses of the deploy's own machine stay there.
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


def measure_on_workers(
    manifest: Manifest, rows: Sequence[EvaluationRow], registry: ModelRegistry, settings: Settings
) -> dict[str, Examined]:
    """Measure every variant on a worker of the measuring pool; returns what was found, by precision."""
    pool = settings.worker.measure_pool or settings.worker.pool
    if not pool or not settings.worker.pool:
        return {}
    order = {"rows": [row.model_dump(mode="json") for row in rows]}
    with _ordered(registry, {variant.precision: order for variant in manifest.variants}) as ids:
        jobs = {
            precision: Job(
                f"measure-{manifest.name}-{precision}",
                {"reference": manifest.reference, "precision": precision, "order": order_id},
            )
            for precision, order_id in ids.items()
        }
        results, failures = _results(MEASURE, pool, jobs, ids, registry, settings)
    return {
        **{precision: Examined.model_validate(result) for precision, result in results.items()},
        **{precision: Examined(error=error) for precision, error in failures.items()},
    }


@contextlib.contextmanager
def _ordered(registry: ModelRegistry, orders: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, str]]:
    ids: dict[str, str] = {}
    try:
        for key, order in orders.items():
            ids[key] = give_order(registry, order)
        yield ids
    finally:
        for order_id in ids.values():
            forget_order(registry, order_id)


def _results(
    flow_name: str,
    pool: str,
    jobs: Mapping[str, Job],
    ids: Mapping[str, str],
    registry: ModelRegistry,
    settings: Settings,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    results: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for key, outcome in run_on_pool(flow_name, pool, jobs, settings).items():
        result = take_back(registry, ids[key], outcome.run_id) if outcome.error is None else None
        if result is None:
            failures[key] = outcome.error or f"The run {outcome.run_id} handed nothing back."
        else:
            results[key] = result
    return results, failures


def _check_builder(wanted: Mapping[str, str]) -> None:
    here = builder_versions()
    other = [
        f"{name} {here.get(name)} (wanted: {number})" for name, number in wanted.items() if here.get(name) != number
    ]
    if other:
        raise StageFailed(
            f"This worker would build otherwise than the deploy says: {', '.join(other)}.",
            "Install the same constraints.txt on every machine.",
        )
