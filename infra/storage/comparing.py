"""The differences between two versions."""

from collections.abc import Mapping

from slmops.infra.records import Record
from slmops.infra.storage.manifest import Manifest, StoredVariant
from slmops.infra.storage.model_files import blob_of
from slmops.infra.storage.version import Version


class Difference(Record):
    """One thing that differs: `what` is a field (`source`), a file (`int4/model.onnx`) or a figure (`int4 ttft_ms`)."""

    what: str
    first: str
    second: str


class Comparison(Record):
    """All differences of two versions, and how many bytes of the second are also in the first."""

    first: str
    second: str
    same_content: bool
    differences: tuple[Difference, ...]
    shared_bytes: int
    size_bytes: int


def compare_versions(first: Version, second: Version) -> Comparison:
    """Compare two versions' manifests and the figures of their last deploys."""
    manifests = (first.manifest, second.manifest)
    blobs = [{blob_of(file) for variant in manifest.variants for file in variant.files} for manifest in manifests]
    found = _differing(*map(_facts, manifests))
    for precision in sorted({variant.precision for manifest in manifests for variant in manifest.variants}):
        found += _differing(*(_files(manifest, precision) for manifest in manifests))
    found += _differing(_figures(first), _figures(second))
    return Comparison(
        first=first.reference,
        second=second.reference,
        same_content=first.manifest.identity == second.manifest.identity,
        differences=tuple(found),
        shared_bytes=sum(blob.size_bytes for blob in blobs[0] & blobs[1]),
        size_bytes=sum(blob.size_bytes for blob in blobs[1]),
    )


def _differing(left: Mapping[str, str], right: Mapping[str, str]) -> list[Difference]:
    names = list(dict.fromkeys([*left, *right]))
    pairs = [Difference(what=name, first=left.get(name, "-"), second=right.get(name, "-")) for name in names]
    return [pair for pair in pairs if pair.first != pair.second]


def _facts(manifest: Manifest) -> dict[str, str]:
    source = manifest.source
    return {
        "source": source.digest[:16],
        "origin": source.origin,
        "architecture": source.architecture,
        "parameters": f"{source.parameters:,}",
        "training run": source.training_run or "-",
        **{f"builder {name}": version for name, version in manifest.builder.items()},
    }


def _files(manifest: Manifest, precision: str) -> dict[str, str]:
    variant: StoredVariant | None = next(
        (variant for variant in manifest.variants if variant.precision == precision), None
    )
    if variant is None:
        return {}
    facts = {
        "recipe": f"{variant.recipe} ({variant.recipe_digest[:8]})",
        "device": f"{variant.device}, {variant.execution_provider}",
    }
    return {
        **{f"{precision} {name}": value for name, value in facts.items()},
        **{f"{precision}/{file.path}": f"{file.sha256[:12]} ({file.size_bytes:,} bytes)" for file in variant.files},
    }


def _figures(version: Version) -> dict[str, str]:
    word = " (says its origin)" if version.says_origin else ""
    figures = {}
    for variant in version.deployed.variants:
        figures[f"{variant.precision} status"] = f"{variant.status}{word}"
        for name, value in variant.metrics.items():
            if value is not None:
                figures[f"{variant.precision} {name}"] = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return figures
