"""The software bill of materials of a stored version: a CycloneDX 1.6 document of its files, source and build stack."""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from slmops.infra.storage.manifest import Manifest, Source, StoredVariant

if TYPE_CHECKING:
    from cyclonedx.model import HashType, Property
    from cyclonedx.model.component import Component

# A scheme of one letter is a drive of Windows.
URL_CREDENTIALS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+://)[^/?#]*@")


def version_sbom(manifest: Manifest, packages: Mapping[str, str], recorded_at: str) -> dict[str, Any]:
    """Return the bill of materials of a version, as a CycloneDX 1.6 document (parsed JSON).

    `packages` is distribution -> version of the build stack; `recorded_at` is ISO 8601, in UTC if it names no zone
    (otherwise `ValueError`). Equal input gives an equal document. The version is `metadata.component`; its variants
    (with their files inside), its source checkpoint and the packages are `components`. Credentials in the source's URLs
    are left out.
    """
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.output.json import JsonV1Dot6

    version = _version(manifest)
    variants = [_variant(manifest, variant) for variant in manifest.variants]
    source = _source(manifest.source, bom_ref=f"source:{manifest.source.digest}")
    stack = [_package(name, number) for name, number in _canonical(packages).items()]
    moment = datetime.fromisoformat(recorded_at)
    bom = Bom(
        serial_number=uuid5(NAMESPACE_URL, f"urn:slmops:manifest:sha256:{manifest.digest}"),
        metadata=BomMetaData(component=version, timestamp=moment if moment.tzinfo else moment.replace(tzinfo=UTC)),
        components=[*variants, source, *stack],
    )
    bom.register_dependency(version, variants)
    for variant in variants:
        bom.register_dependency(variant, [source, *stack])
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    return document


def installed_packages(roots: Iterable[str]) -> dict[str, str]:
    """Return distribution -> version of the roots and of all their installed requirements, sorted by name.

    A root is a requirement such as `olive-ai` or `slmops[signing]`. Names are in canonical form (`onnx-ir`).
    Requirements of an extra are followed only if a root or a requirement names that extra. Packages that are not
    installed are left out.
    """
    versions: dict[str, str] = {}
    visited: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        extras = {"", *wanted.extras} - {extra for visited_name, extra in visited if visited_name == name}
        if not extras:
            continue
        visited |= {(name, extra) for extra in extras}
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        versions[name] = distribution.version
        for requirement in map(Requirement, distribution.requires or []):
            if not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(requirement)
    return dict(sorted(versions.items()))


def _version(manifest: Manifest) -> "Component":
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=manifest.name,
        version=str(manifest.version),
        bom_ref=manifest.reference,
        hashes=_sha256(manifest.digest),
        # The ancestor has no reference of its own: it repeats a component, and references are unique in a document.
        pedigree=Pedigree(ancestors=[_source(manifest.source, bom_ref=None)]),
        properties=_properties(
            {
                "identity": manifest.identity,
                "source_digest": manifest.source.digest,
                "created_at": manifest.created_at,
                **{f"builder:{name}": version for name, version in manifest.builder.items()},
            }
        ),
    )


def _variant(manifest: Manifest, variant: StoredVariant) -> "Component":
    from cyclonedx.model.component import Component, ComponentType

    reference = f"{manifest.reference}/{variant.precision}"
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=reference,
        version=str(manifest.version),
        bom_ref=reference,
        properties=_properties(
            {
                "precision": variant.precision,
                "execution_provider": variant.execution_provider,
                "device": variant.device,
                "recipe": variant.recipe,
                "recipe_digest": variant.recipe_digest,
                "digest": variant.digest,
                "size_bytes": str(variant.size_bytes),
            }
        ),
        components=[
            Component(
                type=ComponentType.FILE,
                name=file.path,
                bom_ref=f"{reference}/{file.path}",
                hashes=_sha256(file.sha256),
                properties=_properties({"size_bytes": str(file.size_bytes)}),
            )
            for file in variant.files
        ],
    )


def _source(source: Source, bom_ref: str | None) -> "Component":
    from cyclonedx.model.component import Component, ComponentType

    facts = {"architecture": source.architecture, "parameters": str(source.parameters)}
    if source.training_run is not None:
        facts["training_run"] = _without_credentials(source.training_run)
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=_without_credentials(source.origin),
        bom_ref=bom_ref,
        hashes=_sha256(source.digest),
        properties=_properties(facts),
    )


def _package(name: str, version: str) -> "Component":
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl = PackageURL(type="pypi", name=name, version=version or None)
    return Component(
        type=ComponentType.LIBRARY, name=name, version=version or None, purl=purl, bom_ref=purl.to_string()
    )


def _sha256(digest: str) -> "list[HashType]":
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=digest)]


def _properties(facts: Mapping[str, str]) -> "list[Property]":
    from cyclonedx.model import Property

    return [Property(name=f"slmops:{name}", value=value) for name, value in facts.items()]


def _canonical(packages: Mapping[str, str]) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in packages.items()}


def _without_credentials(origin: str) -> str:
    return URL_CREDENTIALS.sub(r"\1", origin)
