"""Stage "store": make a version of what was built, and record which variant was chosen."""

from collections.abc import Sequence

from slmops.infra.cyclonedx.sbom import installed_packages, version_sbom
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import Manifest, Source, now
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.signatures import is_signed, sign_version
from slmops.tasks.build.build import BuiltVariant
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.environment.checks import builder_versions, host_facts
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.stage import stage
from slmops.tasks.verdict.choice import Choice

SELECTION = "selection"
SBOM = "sbom"
# What a build runs on; the bill of materials lists what these require too.
BUILD_STACK = ("slmops", "onnxruntime-genai", "olive-ai", "onnxruntime", "torch", "transformers")


@stage("store version", run_name="store-{request.name}")
def commit_version(
    request: DeployRequest, prepared: PreparedCheckpoint, built: Sequence[BuiltVariant], registry: ModelRegistry
) -> Manifest:
    """Make a version of built variants; the same content is the same version."""
    source = Source(
        digest=prepared.digest,
        origin=prepared.origin,
        architecture=prepared.inspection.architecture,
        parameters=prepared.inspection.parameters,
        training_run=request.training_run,
    )
    manifest, is_new = registry.commit(request.name, source, builder_versions(), [one.variant for one in built])
    for one in built if is_new else ():
        record = {**one.model_dump(mode="json", exclude={"variant"}), "host": one.host or host_facts()}
        registry.add_evidence(manifest, "build", {"precision": one.variant.precision, **record})
    return manifest


@stage("record provenance", run_name="provenance-{manifest.name}")
def record_provenance(manifest: Manifest, registry: ModelRegistry, settings: Settings) -> None:
    """Record the bill of materials of a version that has none, and sign it where a key is set and it is not signed.

    Raises `BadInput` for a key that cannot be used.
    """
    if registry.latest_evidence(manifest, SBOM) is None:
        registry.add_evidence(manifest, SBOM, version_sbom(manifest, installed_packages(BUILD_STACK), now()))
    if settings.store.signing_key and not is_signed(registry, manifest):
        sign_version(registry, manifest, settings.store)


def record_choice(manifest: Manifest, choice: Choice, budget: Sequence[str], registry: ModelRegistry) -> None:
    """Record a version's selected variant and why it is, unless that is what this store recorded last."""
    record = {**choice.model_dump(), "budget": list(budget)}
    last = registry.latest_evidence(manifest, SELECTION) or {}
    if registry.of(manifest).says_origin or {name: last.get(name) for name in record} != record:
        registry.add_evidence(manifest, SELECTION, record)


def last_budget(manifest: Manifest, registry: ModelRegistry) -> tuple[str, ...]:
    """Return the budget under which a version's variant was last chosen."""
    return tuple((registry.latest_evidence(manifest, SELECTION) or {}).get("budget", ()))
