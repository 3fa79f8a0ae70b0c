"""Orders: a run's requests to other machines through the store, and the results of their runs."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from slmops.infra.records import Json, Record
from slmops.infra.storage.orders import forget_order, give_order, hand_back, read_order, take_back
from slmops.tasks.runs.dispatch import Job, run_on_pool
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop

T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class Order:
    """The order of one run on a pool: the run's name and parameters, and its content in the store."""

    run_name: str
    parameters: Mapping[str, str]
    content: Record


@dataclass(frozen=True)
class HandedBack:
    """The results of runs, and the errors of failed ones, by the keys of their orders."""

    results: dict[str, Json] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@stage("read order", run_name="read-order")
def read_ordered(content: type[T], order: str) -> T:
    """Return the content of an order that another machine gave; raises `BadInput` as `read_order` does."""
    return content.model_validate(read_order(workshop().registry, order))


@stage("hand back", run_name="hand-back")
def hand_back_result(order: str, attempt: str, result: Record) -> None:
    """Put the result of a run, which is an attempt, into the store."""
    hand_back(workshop().registry, order, attempt, result.model_dump(mode="json"))


def order_on_pool(flow_name: str, pool: str, orders: Mapping[str, Order]) -> HandedBack:
    """Run a flow on a pool's workers for each order, all in parallel, and wait for their ends.

    A flow gets its order's id in the parameter `order`. Raises what `run_on_pool` does.
    """
    shop = workshop()
    handed_back = HandedBack()
    with _in_store(orders) as ids:
        jobs = {key: Job(order.run_name, {**order.parameters, "order": ids[key]}) for key, order in orders.items()}
        with stage_progress(f"{flow_name} on {pool}") as on_progress:
            outcomes = run_on_pool(flow_name, pool, jobs, shop.settings, on_progress)
        for key, outcome in outcomes.items():
            result = take_back(shop.registry, ids[key], outcome.run_id) if outcome.error is None else None
            if result is None:
                handed_back.errors[key] = outcome.error or f"The run {outcome.run_id} returned no result."
            else:
                handed_back.results[key] = result
    return handed_back


@contextlib.contextmanager
def _in_store(orders: Mapping[str, Order]) -> Iterator[dict[str, str]]:
    """Put orders into the store and yield their ids by their keys. They are removed at the end."""
    registry = workshop().registry
    ids: dict[str, str] = {}
    try:
        for key, order in orders.items():
            ids[key] = give_order(registry, order.content.model_dump(mode="json"))
        yield ids
    finally:
        for order_id in ids.values():
            forget_order(registry, order_id)
