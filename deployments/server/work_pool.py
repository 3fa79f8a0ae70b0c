"""The work pools of runs, and the settings of a run's process that a client may not change."""

import contextlib
import copy
from typing import TYPE_CHECKING, Any

from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

DEFAULT_POOL = "slmops"
POOL_TYPE = "process"

# With any of these, a client of the API could run its own program, or replace a module of slmops.
LOCKED = ("command", "env", "working_dir")


def ensure_pool(name: str) -> str | None:
    """Make a work pool of processes, or lock an existing one. Returns a message, or None.

    A pool that also has other deployments is not changed, because they may need the settings. Raises
    `BadInput` for a pool of another type.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    default = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            wanted = WorkPoolCreate(name=name, type=POOL_TYPE, base_job_template=locked(default))
            with contextlib.suppress(ObjectAlreadyExists):  # another machine's `slmops up` was first
                client.create_work_pool(wanted)
            pool = client.read_work_pool(name)
        if pool.type != POOL_TYPE:
            raise BadInput(
                f"The work pool {name!r} is of the type {pool.type!r}; slmops runs in pools of the type {POOL_TYPE!r}.",
                f"Choose another with --pool. Containers have their own worker: prefect worker start --pool {name}",
                code="work-pool-type",
            )
        template = locked(pool.base_job_template or default)
        if template == pool.base_job_template:
            return None
        if others := foreign_deployments(client, name):
            return (
                f"Clients that start runs in the work pool {name!r} can set their command and environment. slmops does "
                f"not lock it, because it has other deployments ({', '.join(others)}); --pool names another pool."
            )
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
        return f"Clients that start runs in the work pool {name!r} can no longer set their command and environment."


def foreign_deployments(client: "SyncPrefectClient", pool: str) -> list[str]:
    """Return the names of a work pool's deployments that are not of slmops: they may need the pool's settings."""
    from prefect.client.schemas.filters import WorkPoolFilter

    from slmops.infra.server_settings import PREFECT_TAG

    in_pool = WorkPoolFilter.model_validate({"name": {"any_": [pool]}})
    deployments = client.read_deployments(work_pool_filter=in_pool)
    return [deployment.name for deployment in deployments if PREFECT_TAG not in deployment.tags]


def locked(template: dict[str, Any]) -> dict[str, Any]:
    """Return a job template whose runs have exactly the program, environment and folder of the template.

    A default of the pool's owner becomes fixed.
    """
    template = copy.deepcopy(template)
    variables, job = template["variables"], template["job_configuration"]
    for name in LOCKED:
        variable = variables.get("properties", {}).pop(name, {})
        if job.get(name) != f"{{{{ {name} }}}}":  # already reported
            continue
        if default := variable.get("default"):
            job[name] = default
        else:
            del job[name]
    variables["additionalProperties"] = False  # the API refuses a run that sets any of them
    return template
