"""The flow `rollback`: an earlier version becomes the champion again, by the same steps as a promotion."""

from prefect import State, flow

from slmops.flows.promote import promoted
from slmops.tasks.request.declaration import takes
from slmops.tasks.request.upkeep_parameters import RollbackParameters
from slmops.tasks.runs.names import run_name
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.champion import change_champion
from slmops.tasks.versions.change import rollback_of
from slmops.tasks.versions.lookup import check_store
from slmops.tasks.versions.promotion import Promotion
from slmops.tasks.workshop import in_workshop, workshop


@flow(name="rollback", flow_run_name=run_name("rollback-{name}"))
@ends_by_its_errors
@in_workshop
@takes(RollbackParameters)
def rollback(parameters: RollbackParameters) -> State[Promotion]:
    """Make the previous champion, or the version that is named, the champion again.

    Returns:
        What was done, in the states that `promote` ends in.
    """
    check_store()
    change = rollback_of(parameters.name, parameters.to, parameters.reason)
    return promoted(change_champion(change, workshop().settings))
