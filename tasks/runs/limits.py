"""Limits across all machines of a Prefect server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.logging import get_run_logger

# A dead worker keeps its slot for this time, which is the shortest that Prefect accepts.
LEASE_S = 60.0


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Wait until no other run on the server is in a block of this name.

    This applies to runs that a worker started. A command's own run neither waits nor makes others wait, because its
    embedded server has no other runs, and the store separates two deploys of one name in any case.
    """
    if "PREFECT__FLOW_RUN_ID" not in os.environ:  # workers set this variable for the process of a run
        yield
        return
    limit = f"slmops-{name}"
    get_run_logger().info("Waiting for other runs that hold %r, if there are any.", limit)
    with only_holder(limit):
        yield


@contextmanager
def only_holder(limit: str) -> Iterator[None]:
    """Wait until no other process holds this limit of the server, and hold it."""
    # Several runs may find no limit and create it at once: one succeeds, and the others' conflict is ignored.
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.upsert_global_concurrency_limit_by_name(limit, 1)
    with concurrency(limit, lease_duration=LEASE_S):
        yield
