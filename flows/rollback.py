"""The flow `rollback`: an earlier version becomes the champion again, by the same steps as a promotion."""

from prefect import State, flow

from slmops.flows.promote import promoted
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.champion import change_champion
from slmops.tasks.versions.change import rollback_of
from slmops.tasks.versions.lookup import check_store
from slmops.tasks.versions.promotion import Promotion
from slmops.tasks.workshop import in_workshop, workshop


@flow(name="rollback", flow_run_name="rollback-{name}")
@ends_by_its_errors
@in_workshop
def rollback(name: str, to: int | None = None, reason: str = "") -> State[Promotion]:
    """Make the previous champion, or the version that is named, the champion again.

    Args:
        name: Name of the model.
        to: Number of the version to go back to; default: the previous champion. After a rollback, the next one goes one
            champion further back, never to a version that was rolled back from.
        reason: Kept in the history of the name's champions.

    Returns:
        What was done, in the states that `promote` ends in.
    """
    check_store()
    return promoted(change_champion(rollback_of(name, to, reason), workshop().settings))
