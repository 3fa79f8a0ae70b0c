"""The flow `promote`: another version becomes the champion, everywhere at once or not at all."""

from functools import partial

from prefect import State, flow
from prefect.states import Completed

from slmops.infra.settings import Settings, load_settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.foundry.registration import register_champion, register_variant, repeat_proof, unregister_variant
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.champion import (
    Change,
    Promotion,
    all_or_nothing,
    card_of,
    check_files,
    hand_back,
    hand_over,
    look_at_present,
    outcome,
    plan_promotion,
    publish_promotion,
    recorded_proof,
    restore_alias,
    restore_foundry,
    set_champion,
)


@flow(name="promote", flow_run_name="promote-{reference}")
@ends_by_its_errors
def promote(reference: str, reason: str = "") -> State[Promotion]:
    """Make a version the champion: in Foundry Local, on the running servers and in the store, or nowhere.

    Args:
        reference: The version, NAME@VERSION, or NAME@ALIAS such as home@candidate.
        reason: Why; kept in the history of the name's champions.

    Returns:
        What was done, in a completed state; a failed one when the version is not proven or something refuses it, and
        then the former champion still serves everywhere.
    """
    settings = load_settings()
    registry = open_registry(settings)
    registry.objects.check()
    return change_champion(plan_promotion(reference, reason, registry), registry, settings)


def change_champion(change: Change, registry: ModelRegistry, settings: Settings) -> State[Promotion]:
    """Prove a version, let it serve, and call it the champion; undo all of it when any of that fails."""
    manifest, variant = change.manifest, change.variant
    present = look_at_present(change.name, registry, settings)
    if present.is_in_step_with(change):
        unchanged = outcome(change, "unchanged")
        return Completed(message=unchanged.summary, data=unchanged)
    row, recorded = recorded_proof(change, registry)

    with registry.in_use(manifest), all_or_nothing(change) as undo:
        registration = register_variant(manifest, variant, *card_of(change, registry, settings), registry, settings)
        if registration.changed:
            undo.add(registration.model_id, partial(unregister_variant, manifest, variant, settings))
        check_files(change, settings)
        proof = repeat_proof(manifest, variant, row, recorded, settings)

        undo.add("Foundry Local", partial(restore_foundry, change, present, settings))
        register_champion(manifest, variant, settings)
        for server, version in present.servers:
            undo.add(server.url, partial(hand_back, server, change, version, registry))
            hand_over(server, change)
        undo.add("the alias", partial(restore_alias, change, registry))
        set_champion(change, registry)

    promotion = outcome(change, change.kind, proof=proof, servers=len(present.servers))
    publish_promotion(promotion)
    return Completed(message=promotion.summary, data=promotion)
