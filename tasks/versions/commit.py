"""Stage "store": make a version of built variants, and record which variant was chosen."""

from collections.abc import Sequence
from functools import cache

from slmops.infra.checkpoints.license import license_of
from slmops.infra.cyclonedx.sbom import installed_packages, version_sbom
from slmops.infra.storage.evidence import BUILD, LICENSE, SBOM, SELECTION, Build, License, Selection
from slmops.infra.storage.manifest import Source, now
from slmops.infra.storage.signatures import is_signed, sign_version
from slmops.infra.storage.version import Version
from slmops.tasks.build.build import BuiltVariant
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.environment.host import builder_versions, host_facts
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.assets import checkpoint_asset, record_asset, version_asset
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop

# The packages of a build. The bill of materials also lists their requirements.
BUILD_STACK = ("slmops", "onnxruntime-genai", "olive-ai", "onnxruntime", "torch", "transformers")


@stage("store version", run_name="store-{request.name}")
def commit_version(request: DeployRequest, prepared: PreparedCheckpoint, built: Sequence[BuiltVariant]) -> Version:
    """Make a version of built variants; the same content is the same version."""
    source = Source(
        digest=prepared.digest,
        origin=prepared.origin,
        architecture=prepared.inspection.architecture,
        parameters=prepared.inspection.parameters,
        training_run=request.training_run,
    )
    registry = workshop().registry
    manifest, is_new = registry.commit(request.name, source, builder_versions(), [build.variant for build in built])
    version = registry.of(manifest)
    _record_license(version, license_of(prepared.folder))
    if not is_new:
        return version
    for build in built:
        took = build.model_dump(exclude={"variant", "host"})
        version.record(BUILD, Build(precision=build.variant.precision, host=build.host or host_facts(), **took))
    sizes = {variant.precision: variant.size_bytes for variant in manifest.variants}
    record_asset(version_asset(version), [checkpoint_asset(source)], digest=manifest.digest, size_bytes=sizes)
    return version


def _record_license(version: Version, name: str | None) -> None:
    if name and version.latest(LICENSE) != License(name=name):
        version.record(LICENSE, License(name=name))


@stage("record provenance", run_name="provenance-{version.name}")
def record_provenance(version: Version) -> None:
    """Record the bill of materials of a version that has none, and sign the version if a key is set and it is unsigned.

    Raises `BadInput` for a key that cannot be used.
    """
    store = workshop().settings.store
    if version.latest(SBOM) is None:
        version.record(SBOM, version_sbom(version.manifest, _build_packages(), now()))
    if store.signing_key and not is_signed(version):
        sign_version(version, store)


@cache
def _build_packages() -> dict[str, str]:
    """Return the packages of a build with their versions; what is installed later, this process does not import."""
    return installed_packages(BUILD_STACK)


@stage("record choice", run_name="choice-{version.name}")
def record_choice(version: Version, choice: Selection, budget: Sequence[str]) -> None:
    """Record a version's selected variant and the reason, unless it equals this store's last record."""
    selection = choice.model_copy(update={"budget": tuple(budget)})
    if version.says_origin or version.latest(SELECTION) != selection:
        version.record(SELECTION, selection)


def last_budget(version: Version) -> tuple[str, ...]:
    """Return the budget under which a version's variant was last chosen."""
    selection = version.latest(SELECTION)
    return selection.budget if selection else ()
