"""What commands name a version by, and how they find it."""

from typing import Annotated

import typer

from infra.settings import load_settings
from infra.storage.manifest import Manifest
from infra.storage.opening import open_registry
from infra.storage.registry import ModelRegistry

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Model, or one version (or alias) of it.")]
Version = Annotated[str, typer.Argument(metavar="NAME@VERSION", help="One version of a model.")]


def the_registry() -> ModelRegistry:
    """Return the registry in the store that the settings name."""
    return open_registry(load_settings())


def version_of(reference: str) -> tuple[ModelRegistry, Manifest]:
    """Return the registry and the version that a reference names; raises `BadInput` when there is none."""
    registry = the_registry()
    return registry, registry.find(reference)
