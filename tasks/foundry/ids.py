"""Foundry's ids of versions and variants, and their folders in its cache."""

import re
from pathlib import Path

from slmops.infra.errors import BadInput
from slmops.infra.foundry.model_folder import (
    model_folder,
)
from slmops.infra.settings import Settings
from slmops.infra.storage.version import Variant

DEVICES = ("cpu", "gpu", "npu")


def foundry_model_id(name: str, precision: str, device: str, version: int) -> str:
    """Return a variant's Foundry id, `NAME-PRECISION-generic-DEVICE:VERSION`.

    Raises `BadInput` for a name that itself ends like one. The runtime derives the alias by removing that ending, so
    two models would share an id or an alias.
    """
    if re.search(rf"-generic-({'|'.join(DEVICES)})$", name):
        raise BadInput(
            f"The name {name!r} ends like a Foundry id.",
            "Choose a name without `-generic-` and a device.",
            code="name-like-foundry-id",
        )
    return f"{name}-{precision}-generic-{device}:{version}"


def champion_model_id(name: str, version: int) -> str:
    """Return the Foundry id of the champion's selected variant, `NAME:VERSION`; its alias is the name."""
    return f"{name}:{version}"


def model_id_of(variant: Variant) -> str:
    """Return a variant's own Foundry id."""
    version = variant.version
    return foundry_model_id(version.name, variant.precision, variant.device, version.number)


def folder_of(variant: Variant, settings: Settings) -> Path:
    """Return a variant's folder in Foundry's cache."""
    return model_folder(settings.foundry_dir, variant.version.name, variant.precision, variant.version.number)
