"""Work pools whose runs are containers, of Docker or Kubernetes: the image and everything else are the pool's.

The job templates are those that Prefect has of its integrations; the worker needs the integration itself.
"""

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from slmops.deployments.server.work_pool import foreign_deployments
from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool

Kind = Literal["docker", "kubernetes"]
KINDS: tuple[Kind, ...] = ("docker", "kubernetes")
# What the worker says of each run. A client that could set another field could mount the host or run its own image.
SET_BY_THE_WORKER = ("name", "labels")
ENVIRONMENT = "env"
RUN_BY = "/usr/bin/env"
TEMPLATES = ("server", "api", "collections_data", "views", "aggregate-worker-metadata.json")
PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")
_NOTHING = object()


def make_container_pool(
    name: str,
    kind: Kind,
    image: str,
    *,
    memory_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> bool:
    """Make a work pool, or bring it up to date; returns whether it is new.

    `memory_bytes` is what a container may take; `environment` is every container's, whose values may name Prefect's
    blocks (`{{ prefect.blocks.secret.NAME }}`), which the worker reads; `limit` is the number of runs at a time. Raises
    `BadInput` for a pool of another type, and one that has other deployments than slmops's.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        template = fixed_template(_template_of(kind), _values(kind, image, memory_bytes, environment or {}))
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            made = WorkPoolCreate(name=name, type=kind, base_job_template=template, concurrency_limit=limit)
            client.create_work_pool(made)
            return True
        _require_own(client, pool, kind)
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, concurrency_limit=limit))
        return False


def fixed_template(template: Mapping[str, Any], values: Mapping[str, object]) -> dict[str, Any]:
    """Return a job template whose runs have the `values` and the template's defaults, and can set neither."""
    variables = template["variables"]["properties"]
    defaults = {name: variable.get("default") for name, variable in variables.items()} | dict(values)
    kept = {name: variables[name] for name in SET_BY_THE_WORKER if name in variables}
    # Only a variable's default may name a block. Its only choice is that default, which no run can change.
    kept[ENVIRONMENT] = {**variables[ENVIRONMENT], "default": values[ENVIRONMENT], "enum": [values[ENVIRONMENT]]}
    job = _filled(template["job_configuration"], defaults)
    _run_by_env(job)
    return {
        "job_configuration": job,
        "variables": {"type": "object", "properties": kept, "additionalProperties": False},
    }


def _run_by_env(job: dict[str, Any]) -> None:
    """Let the container run the worker's command, whatever its image's entry point is; that of slmops is `slmops`."""
    if "job_manifest" in job:
        job["job_manifest"]["spec"]["template"]["spec"]["containers"][0]["command"] = [RUN_BY]
    else:
        job["container_create_kwargs"] = {"entrypoint": [RUN_BY]}


def _filled(part: Any, defaults: Mapping[str, object]) -> Any:
    """Return a part of a template with the placeholders' values; what has none is left out."""
    if isinstance(part, dict):
        filled = {key: _filled(value, defaults) for key, value in part.items()}
        return {key: value for key, value in filled.items() if value is not _NOTHING}
    if isinstance(part, list):
        return [value for value in (_filled(each, defaults) for each in part) if value is not _NOTHING]
    found = PLACEHOLDER.fullmatch(part) if isinstance(part, str) else None
    if found is None or found[1] in (*SET_BY_THE_WORKER, ENVIRONMENT):
        return part
    value = defaults.get(found[1])
    return _NOTHING if value is None else value


def _values(kind: Kind, image: str, memory_bytes: int | None, environment: Mapping[str, str]) -> dict[str, object]:
    values: dict[str, object] = {"image": image, ENVIRONMENT: dict(environment)}
    if memory_bytes is None:
        return values
    if kind == "docker":
        return {**values, "mem_limit": f"{memory_bytes}b"}
    return {**values, "memory_request": str(memory_bytes), "memory_limit": str(memory_bytes)}


def _template_of(kind: Kind) -> Mapping[str, Any]:
    """Return the template that Prefect's package has of an integration; its API would ask GitHub for a newer one."""
    workers_of_packages = json.loads(files("prefect").joinpath(*TEMPLATES).read_text("utf-8"))
    (template,) = [
        workers[kind]["default_base_job_configuration"] for workers in workers_of_packages.values() if kind in workers
    ]
    return dict(template)


def _require_own(client: "SyncPrefectClient", pool: "WorkPool", kind: Kind) -> None:
    if pool.type != kind:
        raise BadInput(
            f"The work pool {pool.name!r} is of the type {pool.type!r}, not {kind!r}.",
            "Give another name.",
            code="work-pool-type",
        )
    if others := foreign_deployments(client, pool.name):
        raise BadInput(
            f"The work pool {pool.name!r} has other deployments ({', '.join(others)}), which may need its settings.",
            "Give another name.",
            code="work-pool-shared",
        )
