"""Stage "store": make a version of what was built, and choose the champion."""

from collections.abc import Sequence

from prefect import task

from infra.storage.manifest import Manifest, Source
from infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from tasks.build import BuiltVariant
from tasks.checkpoint import PreparedCheckpoint
from tasks.environment import builder_versions, host_facts
from tasks.request import DeployRequest
from tasks.retries import PASSING_FAULTS
from tasks.selection import Choice

SELECTION = "selection"


@task(name="store version", task_run_name="store-{request.name}", **PASSING_FAULTS)
def commit_version(
    request: DeployRequest, prepared: PreparedCheckpoint, built: Sequence[BuiltVariant], registry: ModelRegistry
) -> Manifest:
    """Make a version of built variants; the same content is the same version."""
    source = Source(
        digest=prepared.digest,
        origin=prepared.origin,
        architecture=prepared.inspection.architecture,
        parameters=prepared.inspection.parameters,
    )
    manifest, is_new = registry.commit(request.name, source, builder_versions(), [one.variant for one in built])
    for one in built if is_new else ():
        record = {**one.model_dump(mode="json", exclude={"variant"}), "host": host_facts()}
        registry.add_evidence(manifest, "build", {"precision": one.variant.precision, **record})
    return manifest


def record_choice(manifest: Manifest, choice: Choice, budget: Sequence[str], registry: ModelRegistry) -> None:
    """Record a version's selected variant and why it is, unless that is what was recorded last."""
    record = {**choice.model_dump(), "budget": list(budget)}
    last = registry.latest_evidence(manifest, SELECTION) or {}
    if {name: last.get(name) for name in record} != record:
        registry.add_evidence(manifest, SELECTION, record)


def last_budget(manifest: Manifest, registry: ModelRegistry) -> tuple[str, ...]:
    """Return the budget under which a version's variant was last chosen."""
    return tuple((registry.latest_evidence(manifest, SELECTION) or {}).get("budget", ()))


def choose_champion(registry: ModelRegistry, manifest: Manifest, *, promote: bool) -> bool:
    """Point the aliases to a version that can be served; returns whether it is the champion.

    A name's first such version is its champion; a later one is the candidate until it is promoted.
    """
    champion = registry.alias(manifest.name, CHAMPION)
    if champion == manifest.version:
        return True
    if champion is None or promote:
        reason = "promoted by its deploy" if champion else "the first version of its name that can be served"
        registry.set_alias(manifest.name, CHAMPION, manifest.version, reason)
        if registry.alias(manifest.name, CANDIDATE) == manifest.version:
            registry.remove_alias(manifest.name, CANDIDATE)
        return True
    registry.set_alias(manifest.name, CANDIDATE, manifest.version, f"deployed while {champion} was the champion")
    return False
