"""The flows `build-variant` and `measure-variant`: a deploy's heavy stages, on any worker of a pool.

All data goes through the store: the checkpoint as an input, variants as blobs, figures as evidence, and requests and
results as an order (`slmops.infra.storage.orders`).
"""

from prefect import State, flow
from prefect.runtime import flow_run
from prefect.states import Completed

from slmops.tasks.build import variants
from slmops.tasks.exams import on_workers
from slmops.tasks.runs.orders import hand_back_result, read_ordered
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.lookup import find_version
from slmops.tasks.workshop import in_workshop


@flow(name=variants.ON_WORKER)
@ends_by_its_errors
@in_workshop
def build_variant_on_worker(name: str, recipe: str, order: str) -> State[None]:
    """Build one variant of a deploy that runs elsewhere. `deploy` starts it when SLMOPS_WORKER__POOL is set.

    Args:
        name: Name of the model.
        recipe: Recipe that it is built by.
        order: Id of the order in the store, which holds the other parameters.
    """
    built = variants.build_ordered(read_ordered(variants.BuildOrder, order))
    hand_back_result(order, flow_run.id, built)
    return Completed(message=f"Built {name} by {recipe}.")


@flow(name=on_workers.ON_WORKER)
@ends_by_its_errors
@in_workshop
def measure_variant_on_worker(reference: str, precision: str, order: str) -> State[None]:
    """Measure one variant of a stored version on this device, for a `deploy` elsewhere.

    Args:
        reference: The version, NAME@VERSION.
        precision: Which of its variants.
        order: Id of the order in the store, which holds the other parameters.
    """
    asked = read_ordered(on_workers.ExamOrder, order)
    version = find_version(reference)
    with version.in_use():
        found = on_workers.examine_ordered(asked, version.variant(precision))
    hand_back_result(order, flow_run.id, found)
    return Completed(message=f"Measured {reference} {precision}.")
