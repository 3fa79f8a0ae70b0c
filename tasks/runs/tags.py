"""Tags of flow runs, by which Prefect's UI and API find those of a model or a precision: also of a command's runs."""

from collections.abc import Iterator, Mapping

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from slmops.infra.server_settings import PREFECT_TAG

CHAMPION = "champion"  # of a run that changed the champion


def tag_run(*tags: str) -> None:
    """Add tags to those of the current flow run. A server that refuses them does not end the run."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or {*tags} <= {*run.tags}:
        return
    run.tags = sorted({*run.tags, *tags})
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(run.id, tags=run.tags)
    except httpx.HTTPError as error:
        get_run_logger().warning("The run could not be tagged: %s", error)


def tag_by_parameters() -> None:
    """Tag the current flow run with what its parameters say."""
    context = FlowRunContext.get()
    tag_run(PREFECT_TAG, *_tags_of((context.parameters if context else None) or {}))


def _tags_of(parameters: Mapping[str, object]) -> Iterator[str]:
    name = parameters.get("name") or str(parameters.get("reference") or "").partition("@")[0]
    if name:
        yield f"model:{name}"
    precisions = parameters.get("precisions") or [parameters.get("precision")]
    if isinstance(precisions, list | tuple):
        yield from (f"precision:{precision}" for precision in precisions if precision)
