"""`slmops up`: flows from Prefect's UI, by schedule, over its API and on events. `slmops pool`: runs in containers."""

import os
import re
from typing import Annotated

import typer

from slmops.deployments.cli.options import Json
from slmops.deployments.cli.output import print_json, print_line, print_note, print_table
from slmops.deployments.cli.running import load_settings
from slmops.deployments.cli.schedule import require_server
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
Kind = Annotated[str, typer.Option("--type", metavar="[docker|kubernetes]", help="What runs the containers.")]
Image = Annotated[str, typer.Option(help="Image with slmops, such as infra/Dockerfile builds.")]
Memory = Annotated[str | None, typer.Option(help="Memory of a container, such as 8GB; slmops check computes it.")]
Variables = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="Variable of the containers; a block for secrets; repeatable."),
]
AtOnce = Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: unlimited.")]

UNITS = {"MB": 10**6, "GB": 10**9}


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


def pool(
    name: Annotated[str, typer.Argument(metavar="POOL", help="Name of the work pool.")],
    kind: Kind,
    image: Image,
    memory: Memory = None,
    variables: Variables = None,
    limit: AtOnce = None,
    as_json: Json = False,
) -> None:
    """Make a work pool whose runs are containers of an image, and register what deploys start in it."""
    from slmops.deployments.server.container_pool import KINDS, make_container_pool
    from slmops.deployments.server.registration import register_deployments, variant_entries

    chosen = next((known for known in KINDS if known == kind), None)
    if chosen is None:
        raise BadInput(f"There is no work pool of the type {kind!r}.", f"Use {' or '.join(KINDS)}.", code="pool-kind")
    if not re.fullmatch(r"\S+", image):
        raise BadInput("The pool has no image.", "Give one, such as registry.example/slmops:1.", code="pool-image")
    memory_bytes = _bytes_of(memory) if memory else None
    environment = dict(_variable(text) for text in variables or ())
    require_server()
    is_new = make_container_pool(name, chosen, image, memory_bytes=memory_bytes, environment=environment, limit=limit)
    registered = [deployment.name for deployment in register_deployments(variant_entries(name))]
    if as_json:
        print_json({"pool": name, "type": chosen, "image": image, "is_new": is_new, "deployments": registered})
        return
    print_line(f"The work pool {name} ({chosen}, {image}) is {'made' if is_new else 'up to date'}.")
    print_line(f"Start a worker where {chosen} is: pip install prefect-{chosen}; prefect worker start --pool {name}")
    print_line(f"Deploys use it with SLMOPS_WORKER__POOL={name} and a store that the containers reach.")


def _bytes_of(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(MB|GB)", text)
    if not found or float(found[1]) <= 0:
        raise BadInput(f"The memory {text!r} is not valid.", "Write, for example, 8GB.", code="pool-memory")
    return round(float(found[1]) * UNITS[found[2]])


def _variable(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not mark or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise BadInput(f"The variable {text!r} is not NAME=VALUE.", "Write, for example, SLMOPS_STORE__URI=s3://slm.")
    return name, value
