"""Signatures on versions, stored as evidence."""

import hashlib
from pathlib import Path

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.settings import StoreSettings
from slmops.infra.storage.evidence import SIGNATURE, Signature
from slmops.infra.storage.version import Version


def sign_version(version: Version, settings: StoreSettings) -> None:
    """Sign a version's manifest, which names all its files by their digests, with the settings' key.

    Raises `BadInput` without a usable key, `StageFailed` for a manifest that was altered after it was stored.
    """
    from slmops.infra.model_signing.signature import sign_manifest

    if settings.signing_key is None:
        raise BadInput(
            "No signing key is set.",
            "Set SLMOPS_STORE__SIGNING_KEY to a private key (PEM).",
            code="signing-key-not-named",
        )
    password = settings.signing_key_password
    bundle = sign_manifest(
        _intact(version),
        settings.signing_key.expanduser(),
        password.get_secret_value() if password else None,
    )
    version.record(SIGNATURE, Signature(bundle=dict(bundle)))


def check_signature(version: Version, settings: StoreSettings) -> None:
    """Raise `StageFailed` unless one of a version's signatures is valid for the settings' verification key.

    Only the manifest is signed: the caller must compare the files with it.
    """
    from slmops.infra.model_signing.signature import verify_manifest

    key = verification_key(settings)
    stored = _intact(version)
    fault = StageFailed(
        f"{version.reference} is not signed.",
        "Sign it: slmops sign (with SLMOPS_STORE__SIGNING_KEY).",
        code="version-not-signed",
    )
    for signature in version.all(SIGNATURE):
        try:
            return verify_manifest(stored, signature.bundle, key)
        except StageFailed as error:
            fault = error
    raise fault


def is_signed(version: Version) -> bool:
    """Whether a version has a signature by any key."""
    return version.latest(SIGNATURE) is not None


def verification_key(settings: StoreSettings) -> Path:
    """Return the public key for verifying signatures; raises `BadInput` when none is set."""
    if settings.verification_key is None:
        raise BadInput(
            "No verification key is set.",
            "Set SLMOPS_STORE__VERIFICATION_KEY to a public key (PEM).",
            code="verification-key-not-named",
        )
    return settings.verification_key.expanduser()


def _intact(version: Version) -> bytes:
    stored = version.stored_manifest()
    if hashlib.sha256(stored).hexdigest() != version.manifest.digest:
        raise StageFailed(
            f"The manifest of {version.reference} was altered after it was stored.",
            "slmops verify shows the damage; push the version again from a machine with an intact copy.",
            code="manifest-altered",
        )
    return stored
