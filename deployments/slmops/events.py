"""Events with which training code on another machine requests the deployment of its checkpoint.

from slmops.events import checkpoint_ready

checkpoint_ready("s3://models/helpdesk-7", "helpdesk", training_run="https://example.org/runs/7")
"""

from slmops.infra.errors import BadInput, StageFailed

CHECKPOINT_READY = "slmops.checkpoint.ready"


def checkpoint_ready(checkpoint: str, name: str, training_run: str | None = None) -> str:
    """Report to the Prefect server of `PREFECT_API_URL` that a checkpoint is ready; returns the event's id.

    `checkpoint` is what `slmops deploy` takes and the worker can read: `s3://`, `store://`, a Hub id, a folder there.
    Raises `BadInput` for an empty checkpoint or a name that is not valid, `StageFailed` where no server answers.
    """
    # A training script imports this module at its start, and may never call it.
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.events import Event, Resource
    from prefect.settings import PREFECT_API_URL

    from slmops.infra.storage.manifest import check_name

    check_name(name)
    if not checkpoint:
        raise BadInput("No checkpoint is named.", "Give its address, such as s3://bucket/folder.")
    if not PREFECT_API_URL.value():
        raise BadInput("No Prefect server is set.", "Set PREFECT_API_URL.")
    payload = {"checkpoint": checkpoint, "name": name} | ({"training_run": training_run} if training_run else {})
    resource = Resource({"prefect.resource.id": f"slmops.model.{name}", "prefect.resource.name": name})
    event = Event(event=CHECKPOINT_READY, resource=resource, payload=payload)
    # Not by Prefect's emit_event: it sends in the background, and drops events that it cannot send without an error.
    with get_client(sync_client=True) as client:
        try:
            answer = client.request("POST", "/events", json=[event.model_dump(mode="json")])
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise StageFailed(
                f"Prefect's server at {PREFECT_API_URL.value()} did not take the event: {error}.",
                "Send it again: a second event for the same checkpoint builds nothing new.",
            ) from error
    return str(event.id)
