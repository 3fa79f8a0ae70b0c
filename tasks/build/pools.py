"""The work pools that the settings name."""

from slmops.tasks.build import variants
from slmops.tasks.exams import on_workers
from slmops.tasks.runs.dispatch import check_pool
from slmops.tasks.workshop import workshop


def check_pools() -> None:
    """Raise `BadInput` for pools in the settings that cannot take work now."""
    shop = workshop()
    if shop.build_pool:
        check_pool(shop.build_pool, [variants.ON_WORKER])
    if shop.measure_pool:
        check_pool(shop.measure_pool, [on_workers.ON_WORKER])
