"""The flow `gc`: remove old versions, and what nothing needs, from the store and from this machine."""

from prefect import State, flow
from prefect.states import Completed

from slmops.tasks.request.declaration import takes
from slmops.tasks.request.upkeep_parameters import GcParameters
from slmops.tasks.runs.names import run_name
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.garbage import Collection, collect_in_store, publish_collection
from slmops.tasks.versions.lookup import check_store
from slmops.tasks.workshop import in_workshop


@flow(name="gc", flow_run_name=run_name("gc"))
@ends_by_its_errors
@in_workshop
@takes(GcParameters)
def gc(parameters: GcParameters) -> State[Collection]:
    """Remove what nothing needs: content of deleted versions, interrupted work, and with `keep` also old versions.

    Deploys may run at the same time: what they use stays.

    Returns:
        What was removed, in a completed state.
    """
    check_store()
    collection = collect_in_store(keep=parameters.keep, dry_run=parameters.dry_run)
    publish_collection(collection)
    return Completed(message=collection.summary, data=collection)
