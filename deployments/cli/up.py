"""`slmops up`: start flows from Prefect's UI, by schedule, over its API and on events."""

import os
from typing import Annotated

import typer

from slmops.deployments.cli.options import Json
from slmops.deployments.cli.output import print_json, print_line, print_note, print_table
from slmops.deployments.cli.running import load_settings
from slmops.deployments.server.work_pool import DEFAULT_POOL
from slmops.infra.errors import BadInput

DEFAULT_PORT = 4200

Pool = Annotated[str, typer.Option(help="Work pool that this machine's worker takes runs from.")]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="Port of the server, if one is started; 0: a free one.")]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1, help=f"Concurrent runs; default: unlimited in the pool {DEFAULT_POOL}, SLMOPS_WORKER__BUILDS in others."
    ),
]
Check = Annotated[bool, typer.Option("--check", help="Print what is running, and exit.")]


def up(
    pool: Pool = DEFAULT_POOL,
    port: Port = DEFAULT_PORT,
    limit: Limit = None,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Start a Prefect server (if none is set), the deployments and a worker, and run them until stopped."""
    settings = load_settings()
    if not check:
        if as_json:
            raise BadInput("--json goes with --check.", "Leave it out, or add --check.")
        from slmops.deployments.server.up import run_up

        run_up(settings, pool, port, limit, say=print_line, note=print_note)
        return
    from slmops.deployments.server.registration import read_deployments
    from slmops.deployments.server.up_check import check_running

    checked = check_running(os.environ.get("PREFECT_API_URL"), pool, read_deployments())
    if as_json:
        print_json(checked.model_dump(mode="json"))
    else:
        print_table("Running", checked.rows())
    if not checked.ok:
        raise typer.Exit(1)
