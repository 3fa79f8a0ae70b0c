"""Work that one machine requests from another through the store: an order, and the result of each attempt.

Keys: `work/<32 hex>/order.json` and `work/<32 hex>/<attempt>.json`. The machine that gave the order removes them.
"""

import json
import re
import uuid

from slmops.infra.errors import BadInput
from slmops.infra.records import Json
from slmops.infra.storage.registry import ModelRegistry

FOLDER = "work"
ORDER = "order"


def give_order(registry: ModelRegistry, order: dict[str, object]) -> str:
    """Put an order (a JSON object) into the store and return its id, 32 hex digits."""
    order_id = uuid.uuid4().hex
    registry.objects.put_bytes(_key(order_id, ORDER), json.dumps(order).encode())
    return order_id


def read_order(registry: ModelRegistry, order_id: str) -> Json:
    """Return an order; raises `BadInput` if this machine's store does not have it."""
    if not re.fullmatch(r"[0-9a-f]{32}", order_id):
        raise BadInput(
            f"{order_id!r} is not the id of an order.", "Only a deploy gives orders.", code="order-not-valid"
        )
    try:
        return dict(json.loads(registry.objects.read_bytes(_key(order_id, ORDER))))
    except KeyError:
        raise BadInput(
            f"The store has no order {order_id}: there is no {registry.objects.uri(_key(order_id, ORDER))}.",
            "All workers and the machine that starts the deploy need the same SLMOPS_STORE__URI.",
            code="order-missing",
        ) from None


def hand_back(registry: ModelRegistry, order_id: str, attempt: str, result: dict[str, object]) -> None:
    """Put an attempt's result into the store."""
    registry.objects.put_bytes(_key(order_id, attempt), json.dumps(result).encode())


def take_back(registry: ModelRegistry, order_id: str, attempt: str) -> Json | None:
    """Return the result that an attempt stored, or None."""
    try:
        return dict(json.loads(registry.objects.read_bytes(_key(order_id, attempt))))
    except KeyError:
        return None


def forget_order(registry: ModelRegistry, order_id: str) -> None:
    """Remove an order and all its results."""
    registry.objects.delete([entry.key for entry in registry.objects.entries(f"{FOLDER}/{order_id}")])


def _key(order_id: str, name: str) -> str:
    return f"{FOLDER}/{order_id}/{name}.json"
