"""A pause of the current flow run until somebody fills in its form, in Prefect's UI or over its API.

Prefect's `pause_flow_run` has neither a form nor a waiting run any more if a server's answer is lost or its API does
not answer for a minute. It also pauses before the form is there, so that an early answer is refused.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import State
from prefect.exceptions import PrefectHTTPStatusError
from prefect.input import RunInput, create_flow_run_input, keyset_from_paused_state
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Paused

from slmops.infra.errors import StageFailed

POLL_S = 2.0
# The server must not end the pause before this process does: its own end has no reason and no report.
MARGIN_S = 3600

Form = TypeVar("Form", bound=RunInput)


def pause_for(form: type[Form], question: str, unanswered: Form, limit_s: float) -> Form:
    """Pause the current flow run until somebody has filled in `form`, which is shown with `question`, in Markdown.

    After `limit_s` this process itself answers with `unanswered`, which must differ from what others can answer. While
    the API does not answer, the run waits on. Raises `StageFailed` if the run cannot be paused, or was ended meanwhile.
    """
    run_id = UUID(flow_run.id)
    state: State[object] = Paused(timeout_seconds=int(limit_s) + MARGIN_S, pause_key=uuid4().hex)
    keys = keyset_from_paused_state(state)
    state.state_details.run_input_keyset = {str(name): key for name, key in keys.items()}
    for save in (
        lambda: form.save(keys, run_id),
        lambda: create_flow_run_input(keys["description"], question, run_id),
    ):
        with _done_before():
            save()
    with get_client(sync_client=True) as client:
        paused = client.set_flow_run_state(run_id, state).state
        if not (paused and paused.is_paused()):
            raise StageFailed(f"The run could not be paused: it is {_shown(paused)}.", "Start it again.")
        get_run_logger().info("The run waits for an answer, in Prefect's UI or over its API.")
        ended = _end_of_pause(client, run_id, unanswered, time.monotonic() + limit_s)
        if not ended.is_running():
            raise StageFailed(f"The run was ended while it waited: it is {_shown(ended)}.", "Start it again.")
    return cast(Form, form.load(keys, run_id))


@contextmanager
def _done_before() -> Iterator[None]:
    """Ignore a conflict: the client sends a request again whose answer was lost."""
    try:
        yield
    except PrefectHTTPStatusError as error:
        if error.response.status_code != httpx.codes.CONFLICT:
            raise


def _end_of_pause(client: SyncPrefectClient, run_id: UUID, unanswered: RunInput, deadline: float) -> State[object]:
    given_up_at = deadline + MARGIN_S
    while True:
        try:
            if time.monotonic() > deadline:  # refused if somebody answers at the last moment
                client.resume_flow_run(run_id, unanswered.model_dump(mode="json"))
            state = client.read_flow_run(run_id).state
            if state and not state.is_paused():
                return state
        except httpx.HTTPError as error:
            if time.monotonic() > given_up_at:
                raise StageFailed(f"Prefect's API does not answer: {error}.", "Start the server again.") from error
            get_run_logger().warning("Prefect's API does not answer: %s. The run waits on.", error)
        time.sleep(POLL_S)


def _shown(state: State[object] | None) -> str:
    return str(state.name) if state else "without a state"
