"""Signatures on versions, kept as evidence beside them."""

import hashlib
from pathlib import Path

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.settings import StoreSettings
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.registry import SIGNATURE, ModelRegistry


def sign_version(registry: ModelRegistry, manifest: Manifest, settings: StoreSettings) -> None:
    """Sign a version's manifest, which names all its files by their digests, with the settings' key.

    Raises `BadInput` without a usable key, `StageFailed` for a manifest that was altered after it was stored.
    """
    from slmops.infra.model_signing.signature import sign_manifest

    if settings.signing_key is None:
        raise BadInput("No key to sign with is named.", "Set SLMOPS_STORE__SIGNING_KEY to a private key (PEM).")
    password = settings.signing_key_password
    bundle = sign_manifest(
        _intact(registry, manifest),
        settings.signing_key.expanduser(),
        password.get_secret_value() if password else None,
    )
    registry.add_evidence(manifest, SIGNATURE, {"bundle": bundle})


def check_signature(registry: ModelRegistry, manifest: Manifest, settings: StoreSettings) -> None:
    """Raise `StageFailed` unless one of a version's signatures is by the settings' verification key and holds.

    The manifest is what is signed: whether the files are those that it names has to be looked at besides.
    """
    from slmops.infra.model_signing.signature import verify_manifest

    key = verification_key(settings)
    stored = _intact(registry, manifest)
    fault = StageFailed(
        f"{manifest.reference} is not signed.", "Sign it: slmops sign (with SLMOPS_STORE__SIGNING_KEY)."
    )
    for record in registry.evidence(manifest, SIGNATURE):
        try:
            return verify_manifest(stored, record["bundle"], key)
        except StageFailed as error:
            fault = error
    raise fault


def is_signed(registry: ModelRegistry, manifest: Manifest) -> bool:
    """Whether a version has a signature, by whatever key."""
    return registry.latest_evidence(manifest, SIGNATURE) is not None


def verification_key(settings: StoreSettings) -> Path:
    """Return the public key that signatures are verified with; raises `BadInput` when none is named."""
    if settings.verification_key is None:
        raise BadInput(
            "No key to verify signatures with is named.", "Set SLMOPS_STORE__VERIFICATION_KEY to a public key (PEM)."
        )
    return settings.verification_key.expanduser()


def _intact(registry: ModelRegistry, manifest: Manifest) -> bytes:
    stored = registry.stored_manifest(manifest)
    if hashlib.sha256(stored).hexdigest() != manifest.digest:
        raise StageFailed(
            f"The manifest of {manifest.reference} was altered after it was stored.",
            "See with slmops verify; push the version again from a machine that has it whole.",
        )
    return stored
