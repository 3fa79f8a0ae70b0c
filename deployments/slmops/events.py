"""Events with which training code on another machine requests the deployment of its checkpoint.

from slmops.events import checkpoint_ready

checkpoint_ready("s3://models/helpdesk-7", "helpdesk", training_run="https://example.org/runs/7")

It needs only Python's standard library, and the server's address as `slmops.client` does.
"""

import uuid
from datetime import UTC, datetime

from slmops.client import post
from slmops.infra.errors import BadInput
from slmops.infra.storage.names import check_name

CHECKPOINT_READY = "slmops.checkpoint.ready"


def checkpoint_ready(checkpoint: str, name: str, training_run: str | None = None) -> str:
    """Report to the Prefect server of `PREFECT_API_URL` that a checkpoint is ready; returns the event's id.

    `checkpoint` is what `slmops deploy` takes and the worker can read: `s3://`, `store://`, a Hub id, a folder there.
    Raises `BadInput` for an empty checkpoint or a name that is not valid, `StageFailed` where no server answers.
    """
    check_name(name)
    if not checkpoint:
        raise BadInput("No checkpoint is named.", "Give its address, such as s3://bucket/folder.")
    event_id = str(uuid.uuid4())
    event = {
        "id": event_id,
        "occurred": datetime.now(UTC).isoformat(),
        "event": CHECKPOINT_READY,
        "resource": {"prefect.resource.id": f"slmops.model.{name}", "prefect.resource.name": name},
        "payload": {"checkpoint": checkpoint, "name": name} | ({"training_run": training_run} if training_run else {}),
    }
    post("events", [event])  # a call that is repeated because the server was busy has the same id
    return event_id
