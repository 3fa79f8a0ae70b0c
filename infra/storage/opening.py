"""From a store's URI to the store."""

from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.infra.storage.file_uris import path_of
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.objects import ObjectStore
from slmops.infra.storage.registry import ModelRegistry


def open_object_store(uri: str, settings: Settings) -> ObjectStore:
    """Return the store at a `file:///` or an `s3://` URI; no request is made.

    Raises `BadInput` for any other scheme, and for a bucket or prefix that is not valid.
    """
    scheme = uri.partition("://")[0]
    if scheme == "s3":
        from slmops.infra.storage.s3.store import S3ObjectStore  # a local store does not need it

        return S3ObjectStore(uri, settings.store)
    if folder := path_of(uri):
        return LocalObjectStore(folder)
    shown = f"of the scheme {scheme!r}" if "@" in uri else repr(uri)  # the part before an @ may be a password
    raise BadInput(
        f"The store {shown} cannot be opened.",
        "SLMOPS_STORE__URI takes file:///folder or s3://bucket/prefix.",
        code="store-not-valid",
    )


def open_registry(settings: Settings) -> ModelRegistry:
    """Return the registry in the store that the settings name; raises `BadInput` when that cannot be opened."""
    objects = open_object_store(settings.store_uri, settings)
    if isinstance(objects, LocalObjectStore):
        return ModelRegistry(objects)
    return ModelRegistry(objects, cache=LocalObjectStore(settings.cache_dir / "store"))


def open_local_registry(settings: Settings) -> ModelRegistry:
    """Return the registry in this machine's own store, under the home directory."""
    return ModelRegistry(LocalObjectStore(settings.home_dir / "store"))
