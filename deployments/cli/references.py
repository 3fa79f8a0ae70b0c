"""What commands name a version by, and how they find it.

Settings and store are imported where a command needs them: without them, `slmops --help` takes half the time.
"""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slmops.infra.settings import Settings
    from slmops.infra.storage.manifest import Manifest
    from slmops.infra.storage.registry import ModelRegistry

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Model, or one version (or alias) of it.")]
Version = Annotated[str, typer.Argument(metavar="NAME@VERSION", help="One version of a model.")]


def load_settings() -> "Settings":
    """Return the settings, as `slmops.infra.settings.load_settings` reads them."""
    from slmops.infra import settings

    return settings.load_settings()


def the_registry() -> "ModelRegistry":
    """Return the registry in the store that the settings name."""
    from slmops.infra.storage.opening import open_registry

    return open_registry(load_settings())


def version_of(reference: str) -> "tuple[ModelRegistry, Manifest]":
    """Return the registry and the version that a reference names; raises `BadInput` when there is none."""
    registry = the_registry()
    return registry, registry.find(reference)
