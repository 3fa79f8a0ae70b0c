"""The signature of a stored version, by OpenSSF model signing with an elliptic-curve key; it works offline.

The signed object is a folder with the version's stored `manifest.json`. The manifest names every file with its
SHA-256, so the signature covers all of them.
"""

import base64
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.infra.errors import BadInput, StageFailed

SIGNED_FILE = "manifest.json"
SIGNED_FOLDER = "version"  # the library writes the folder's name into the signature
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
NEW_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem"
PUBLIC_KEY = "openssl pkey -in key.pem -pubout -out key.pub"


def sign_manifest(manifest_bytes: bytes, private_key: Path, password: str | None) -> dict[str, Any]:
    """Sign a stored manifest and return the signature, a Sigstore bundle (parsed JSON).

    `private_key` is a PEM file with a key on P-256, P-384 or P-521; `password` decrypts it; None or empty if it is not
    encrypted. Raises `BadInput` for a key that cannot be used, and if model-signing is not installed.
    """
    _require_library()
    secret = _secret(password)
    _check_private_key(private_key, secret)
    from model_signing.signing import Config

    with tempfile.TemporaryDirectory() as parent:
        folder, path = _signed_folder(Path(parent), manifest_bytes), Path(parent) / "signature.json"
        # The library expects text and passes it unchanged to `cryptography`, which accepts only bytes.
        Config().use_elliptic_key_signer(private_key=private_key, password=secret).sign(folder, path)
        signature: dict[str, Any] = json.loads(path.read_bytes())
        return signature


def verify_manifest(manifest_bytes: bytes, signature: Mapping[str, object], public_key: Path) -> None:
    """Check that a signature was made of this stored manifest with the private key that belongs to a public key.

    `public_key` is a PEM file. Raises `BadInput` for a key that cannot be used, and if model-signing is not installed;
    `StageFailed` if the signature is malformed, altered, of another manifest or by another key.
    """
    _require_library()
    fingerprint = _check_public_key(public_key)
    signer, signed = _claims(signature)
    if signer != fingerprint:
        raise StageFailed(
            f"The manifest was not signed with the key that {public_key} belongs to.",
            "Verify it with the public key of its signer, or do not use the version.",
            code="signature-of-other-key",
        )
    # The library ignores files that the signature lists as ignored. A signature of an empty folder that ignores the
    # manifest would be valid for every manifest.
    if signed != [{"name": SIGNED_FILE, "algorithm": "sha256", "digest": hashlib.sha256(manifest_bytes).hexdigest()}]:
        raise StageFailed(
            "The signature is of another manifest.",
            "The manifest or the signature was altered: do not use the version.",
            code="signature-of-other-manifest",
        )
    from cryptography.exceptions import InvalidSignature
    from model_signing.verifying import Config

    with tempfile.TemporaryDirectory() as parent:
        folder, path = _signed_folder(Path(parent), manifest_bytes), Path(parent) / "signature.json"
        path.write_text(json.dumps(dict(signature)), "utf-8", newline="\n")
        verifier = Config().use_elliptic_key_verifier(public_key=public_key)
        try:
            verifier.verify(folder, path)
        # The library reads a bundle's fields without checking that they exist.
        except (InvalidSignature, ValueError, TypeError, LookupError, AttributeError) as error:
            raise StageFailed(
                f"The signature does not verify with the key {public_key}.",
                "The signature was altered: do not use the version.",
                code="signature-not-valid",
            ) from error


def _require_library() -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"Signatures need the package model-signing, which cannot be imported: {error}.",
            "pip install 'slmops[signing]'",
            code="signing-missing",
        ) from error


def _signed_folder(parent: Path, manifest_bytes: bytes) -> Path:
    folder = parent / SIGNED_FOLDER
    folder.mkdir()
    (folder / SIGNED_FILE).write_bytes(manifest_bytes)
    return folder


def _claims(signature: Mapping[str, Any]) -> tuple[object, object]:
    """Return the key fingerprint and the signed files that a bundle claims; both are not verified here."""
    try:
        signer = signature["verificationMaterial"]["publicKey"]["hint"]
        statement = json.loads(base64.b64decode(signature["dsseEnvelope"]["payload"], validate=True))
        return signer, statement["predicate"]["resources"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise StageFailed(
            "The signature is malformed: it is not a bundle that model-signing made with a key.",
            "Do not use the version, or sign it again if you trust it.",
            code="signature-malformed",
        ) from error


def _check_private_key(path: Path, secret: bytes | None) -> None:
    """Raise `BadInput` for a private key that the library does not accept."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read_key(path)
    if b"PRIVATE KEY-----" not in content:
        raise _no_key(path, content, "private", f"Make one with {NEW_KEY}")
    # The errors are not chained, because their causes may reveal the key.
    try:
        key = load_pem_private_key(content, secret)
    except TypeError:
        raise (
            BadInput(
                f"The key {path} is not encrypted, but a password was given.",
                "Omit the password.",
                code="key-not-encrypted",
            )
            if secret
            else BadInput(
                f"The key {path} is encrypted, and no password was given.",
                "Give the key's password.",
                code="key-encrypted",
            )
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise (
            BadInput(
                f"The key {path} cannot be decrypted with this password.",
                "Give the password of this key.",
                code="key-password-wrong",
            )
            if secret
            else BadInput(
                f"The key {path} is damaged or of an unknown kind.", f"Make one with {NEW_KEY}", code="key-damaged"
            )
        ) from None
    _check_curve(path, key)


def _check_public_key(path: Path) -> str:
    """Return the fingerprint of a public key in a bundle: the SHA-256 (hex) of its PEM form.

    Raises `BadInput` for a key that the library does not accept.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    content = _read_key(path)
    if b"PUBLIC KEY-----" not in content:
        raise _no_key(path, content, "public", f"Make it of the private one with {PUBLIC_KEY}")
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise BadInput(
            f"The key {path} is damaged or of an unknown kind.",
            f"Make it of the private one with {PUBLIC_KEY}",
            code="key-damaged",
        ) from None
    _check_curve(path, key)
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _read_key(path: Path) -> bytes:
    if "-----BEGIN" in str(path):
        raise BadInput(
            "The key itself was given instead of its file.",
            "Write the key to a file and give its path.",
            code="key-in-setting",
        )
    try:
        # A pipe can be read only once, and the library reads the file again.
        if path.is_file():
            return path.read_bytes()
        reason = "it is not a file" if path.exists() else "it does not exist"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    raise BadInput(
        f"The key {path} cannot be read: {reason}.",
        "Give the path of a PEM file that you may read.",
        code="key-unreadable",
    )


def _no_key(path: Path, content: bytes, wanted: str, what_to_do: str) -> BadInput:
    kinds = {"certificate": b"CERTIFICATE-----", "private key": b"PRIVATE KEY-----", "public key": b"PUBLIC KEY-----"}
    found = next((f"a {kind}" for kind, mark in kinds.items() if mark in content), "no key in PEM form")
    return BadInput(f"{path} has {found}; a {wanted} key is needed.", what_to_do, code="key-of-other-role")


def _check_curve(path: Path, key: object) -> None:
    # Keys of other kinds have no curve.
    found = getattr(getattr(key, "curve", None), "name", type(key).__name__.strip("_"))
    if found not in CURVES:
        raise BadInput(
            f"The key {path} is of the kind {found}; signatures need one on {', '.join(CURVES.values())}.",
            f"Make one with {NEW_KEY}",
            code="key-kind",
        )


def _secret(password: str | None) -> bytes | None:
    # Recover the bytes of a password from the environment.
    return password.encode("utf-8", "surrogateescape") if password else None
