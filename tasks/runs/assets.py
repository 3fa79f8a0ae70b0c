"""Prefect assets: the lineage dataset -> checkpoint -> version -> champion, where Prefect's UI shows it.

An asset's key is a URI. Versions and champions have keys under the address of their store. What lies on S3 has its own
address; any other dataset or checkpoint is named by its content, because its path means nothing to other machines.
"""

import hashlib
from collections.abc import Sequence

from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.types.names import MAX_ASSET_KEY_LENGTH, RESTRICTED_ASSET_CHARACTERS

from slmops.infra.storage.manifest import Source
from slmops.infra.storage.version import Version

TOOL = "slmops"
S3 = "s3://"
SHOWN_DIGITS = 12  # of a digest


def dataset_asset(origin: str, fingerprint: str) -> Asset:
    """Return the asset of a dataset: `origin` as the user named it, and the digest of its rows."""
    return _by_content("dataset", origin, fingerprint)


def checkpoint_asset(source: Source) -> Asset:
    """Return the asset of the checkpoint that a version came from."""
    return _by_content("checkpoint", source.origin, source.digest)


def base_asset(origin: str, digest: str) -> Asset:
    """Return the asset of a checkpoint that was fine-tuned."""
    return _by_content("checkpoint", origin, digest)


def version_asset(version: Version) -> Asset:
    """Return the asset of a version."""
    return _asset(version.uri.removesuffix("/manifest.json"), version.reference)


def champion_asset(version: Version) -> Asset:
    """Return the asset that is a model's champion, whichever version that is."""
    return _asset(version.registry.objects.uri(f"models/{version.name}/aliases/champion"), f"{version.name}@champion")


def record_asset(asset: Asset, made_from: Sequence[Asset], **facts: object) -> None:
    """Tell Prefect in a task run of its own that an asset was made from others; `facts` are JSON values on it.

    Prefect sends it in the background. A run does not fail when no server takes it.
    """

    @materialize(
        asset,
        by=TOOL,
        name="record asset",
        task_run_name=f"asset-{asset.properties.name if asset.properties else asset.key}",
        asset_deps=[*made_from],
        cache_policy=NO_CACHE,
    )
    def record() -> None:
        add_asset_metadata(asset, facts)

    record()


def _by_content(kind: str, origin: str, digest: str) -> Asset:
    key = origin.rstrip("/") if origin.startswith(S3) else f"{kind}://sha256/{digest}"
    return _asset(key, f"{kind} {digest[:SHOWN_DIGITS]}")


def _asset(address: str, name: str) -> Asset:
    """Return the asset at an address, whose characters that Prefect does not allow are replaced."""
    key = "".join("_" if character in RESTRICTED_ASSET_CHARACTERS else character for character in address)
    if len(key) > MAX_ASSET_KEY_LENGTH:
        key = f"{TOOL}://sha256/{hashlib.sha256(key.encode()).hexdigest()}"
    return Asset(key=key, properties=AssetProperties(name=name))
