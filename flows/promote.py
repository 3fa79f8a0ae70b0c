"""The flow `promote`: another version becomes the champion, in all places or in none."""

from prefect import State, flow
from prefect.states import Completed

from slmops.tasks.request.declaration import takes
from slmops.tasks.request.upkeep_parameters import PromoteParameters
from slmops.tasks.runs.names import run_name
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.approval import approved
from slmops.tasks.versions.champion import change_champion
from slmops.tasks.versions.change import promotion_to
from slmops.tasks.versions.lookup import check_store
from slmops.tasks.versions.promotion import Promotion, publish_promotion
from slmops.tasks.workshop import in_workshop, workshop


@flow(name="promote", flow_run_name=run_name("promote-{reference}"))
@ends_by_its_errors
@in_workshop
@takes(PromoteParameters)
def promote(parameters: PromoteParameters) -> State[Promotion]:
    """Make a version the champion in Foundry Local, on the running servers and in the store: in all or in none.

    Returns:
        What was done, in a completed state; a failed one when the version is not proven or a step fails, and one named
        `Rejected` when nobody approved it. The former champion then still serves everywhere.
    """
    check_store()
    change = promotion_to(parameters.reference, parameters.reason)
    if parameters.approval:
        change = approved(change)
    return promoted(change_champion(change, workshop().settings))


def promoted(promotion: Promotion) -> State[Promotion]:
    """Return the final state of a run that changed the champion, or had nothing to change."""
    if promotion.status != "unchanged":
        publish_promotion(promotion)
    return Completed(message=promotion.summary, data=promotion)
