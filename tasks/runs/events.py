"""Events of slmops on Prefect's server, on which automations can act; the resource is `slmops.model.NAME`."""

from prefect.events import emit_event

VERSION_REGISTERED = "slmops.version.registered"
VERSION_REJECTED = "slmops.version.rejected"
CHAMPION_PROMOTED = "slmops.champion.promoted"
CHAMPION_ROLLED_BACK = "slmops.champion.rolled-back"
REGRESSION = "slmops.benchmark.regression"


def tell(event: str, name: str, reference: str, summary: str, **more: object) -> None:
    """Emit an event on a model; its payload is the version's reference, a sentence, and what is given as JSON values.

    Prefect sends it in the background. A run does not fail when no server takes it.
    """
    emit_event(
        event,
        resource={"prefect.resource.id": f"slmops.model.{name}", "prefect.resource.name": reference},
        payload={"reference": reference, "summary": summary, **more},
    )
