"""Limits that hold over all machines of a Prefect server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.logging import get_run_logger

# A worker that died holds its place for as long as this: the shortest that Prefect takes.
LEASE_S = 60.0


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Wait until no other run on the server is in a block of this name.

    It holds for runs that a worker started. A command's own run neither waits nor makes others wait: its embedded
    server knows of no others, and the store keeps two deploys of one name apart in any case.
    """
    if "PREFECT__FLOW_RUN_ID" not in os.environ:  # what a worker gives to the process of a run
        yield
        return
    limit = f"slmops-{name}"
    get_run_logger().info("Waiting for other runs that hold %r, if there are any.", limit)
    with only_holder(limit):
        yield


@contextmanager
def only_holder(limit: str) -> Iterator[None]:
    """Wait until no other process holds this limit of the server, and hold it."""
    # The server knows no way to make one unless it is there: of several that find none, one makes it.
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.upsert_global_concurrency_limit_by_name(limit, 1)
    with concurrency(limit, lease_duration=LEASE_S):
        yield
