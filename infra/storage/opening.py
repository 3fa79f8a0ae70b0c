"""From a store's URI to the store."""

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from infra.errors import BadInput
from infra.settings import Settings
from infra.storage.local import LocalObjectStore
from infra.storage.objects import ObjectStore
from infra.storage.registry import ModelRegistry


def open_object_store(uri: str) -> ObjectStore:
    """Return the store at a `file:///` URI.

    Raises `BadInput` for any other scheme.
    """
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return LocalObjectStore(Path(url2pathname(parts.path)))
    raise BadInput(f"The store {uri!r} cannot be opened.", "SLMOPS_STORE__URI takes file:///folder.")


def open_registry(settings: Settings) -> ModelRegistry:
    """Return the registry in the store that the settings name; raises `BadInput` when that cannot be opened."""
    return ModelRegistry(open_object_store(settings.store_uri))
