"""The signature of a version: what it accepts and refuses, and that it works offline."""

import base64
import copy
import functools
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from slmops.infra.errors import BadInput, SlmopsError, StageFailed
from slmops.infra.model_signing.signature import sign_manifest, verify_manifest
from slmops.infra.storage.manifest import Manifest, Source
from tests.support.errors import coded

ROOT = Path(__file__).resolve().parents[3]
MANIFEST = Manifest(
    name="home",
    version=3,
    source=Source(digest="a" * 64, origin="/checkpoints/home", architecture="Qwen2ForCausalLM", parameters=1),
    builder={},
    variants=(),
    created_at="2026-11-22T09:00:00+00:00",
).to_bytes()
PASSWORD = "correct horse ü"
PKCS8, SEC1 = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL


def private_pem(key: Any, password: str | None = None, form: serialization.PrivateFormat = PKCS8) -> bytes:
    lock = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, lock))


def public_pem(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))


KEY, OTHER_KEY = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
SECP256K1, RSA, ED25519 = (
    ec.generate_private_key(ec.SECP256K1()),
    rsa.generate_private_key(65537, 2048),
    ed25519.Ed25519PrivateKey.generate(),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a pair of keys, an encrypted one, and another public key."""
    (tmp_path / "key.pem").write_bytes(private_pem(KEY))
    (tmp_path / "locked.pem").write_bytes(private_pem(KEY, PASSWORD))
    (tmp_path / "key.pub").write_bytes(public_pem(KEY))
    (tmp_path / "other.pub").write_bytes(public_pem(OTHER_KEY))
    return tmp_path


@pytest.fixture
def signature(folder: Path) -> dict[str, Any]:
    return sign_manifest(MANIFEST, folder / "key.pem", None)


def statement_of(signature: dict[str, Any]) -> dict[str, Any]:
    statement: dict[str, Any] = json.loads(base64.b64decode(signature["dsseEnvelope"]["payload"]))
    return statement


def encoded(statement: Any) -> str:
    return base64.b64encode(json.dumps(statement).encode()).decode()


class TestSigning:
    def test_what_was_signed_verifies(self, folder: Path, signature: dict[str, Any]) -> None:
        verify_manifest(MANIFEST, signature, folder / "key.pub")
        verify_manifest(MANIFEST, json.loads(json.dumps(signature)), folder / "key.pub")

    def test_it_names_the_manifest_and_nothing_of_this_machine(self, folder: Path, signature: dict[str, Any]) -> None:
        statement = statement_of(signature)
        assert [subject["name"] for subject in statement["subject"]] == ["version"]
        assert [resource["name"] for resource in statement["predicate"]["resources"]] == ["manifest.json"]
        assert str(folder) not in json.dumps(statement)

    @pytest.mark.parametrize("form", [PKCS8, SEC1])
    def test_an_encrypted_key_needs_its_password(self, form: serialization.PrivateFormat, folder: Path) -> None:
        (folder / "locked.pem").write_bytes(private_pem(KEY, PASSWORD, form))
        verify_manifest(MANIFEST, sign_manifest(MANIFEST, folder / "locked.pem", PASSWORD), folder / "key.pub")
        for password, code in ((None, "key-encrypted"), ("", "key-encrypted"), ("wrong", "key-password-wrong")):
            with pytest.raises(BadInput, check=coded(code)):
                sign_manifest(MANIFEST, folder / "locked.pem", password)

    def test_a_password_for_an_unencrypted_key_is_refused_and_an_empty_one_is_ignored(self, folder: Path) -> None:
        with pytest.raises(BadInput, check=coded("key-not-encrypted")):
            sign_manifest(MANIFEST, folder / "key.pem", PASSWORD)
        verify_manifest(MANIFEST, sign_manifest(MANIFEST, folder / "key.pem", ""), folder / "key.pub")

    @pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda one: str(one.name))
    @pytest.mark.parametrize("form", [PKCS8, SEC1])
    def test_three_curves_are_taken(
        self, curve: ec.EllipticCurve, form: serialization.PrivateFormat, folder: Path
    ) -> None:
        key = ec.generate_private_key(curve)
        (folder / "key.pem").write_bytes(private_pem(key, form=form))
        (folder / "key.pub").write_bytes(public_pem(key))
        verify_manifest(MANIFEST, sign_manifest(MANIFEST, folder / "key.pem", None), folder / "key.pub")

    @pytest.mark.parametrize("content", [b"", b"\x00\xff\r\n", b"x" * 3_000_000], ids=["empty", "binary", "large"])
    def test_the_bytes_are_signed_as_they_are(self, content: bytes, folder: Path) -> None:
        made = sign_manifest(content, folder / "key.pem", None)
        verify_manifest(content, made, folder / "key.pub")
        with pytest.raises(StageFailed):
            verify_manifest(content + b"\n", made, folder / "key.pub")


class TestRefusals:
    def test_any_changed_byte_is_found(self, folder: Path, signature: dict[str, Any]) -> None:
        for position in range(len(MANIFEST)):
            altered = bytearray(MANIFEST)
            altered[position] ^= 1 << position % 8
            with pytest.raises(StageFailed, check=coded("signature-of-other-manifest")):
                verify_manifest(bytes(altered), signature, folder / "key.pub")
        for altered in (MANIFEST[:-1], MANIFEST + b" ", b"", MANIFEST.replace(b"\n", b"\r\n")):
            with pytest.raises(StageFailed, check=coded("signature-of-other-manifest")):
                verify_manifest(altered, signature, folder / "key.pub")

    def test_another_key_does_not_verify(self, folder: Path, signature: dict[str, Any]) -> None:
        with pytest.raises(StageFailed, check=coded("signature-of-other-key")):
            verify_manifest(MANIFEST, signature, folder / "other.pub")
        (folder / "other.pem").write_bytes(private_pem(OTHER_KEY))
        hint = sign_manifest(MANIFEST, folder / "other.pem", None)["verificationMaterial"]["publicKey"]["hint"]
        signature["verificationMaterial"]["publicKey"]["hint"] = hint
        with pytest.raises(StageFailed, check=coded("signature-not-valid")):
            verify_manifest(MANIFEST, signature, folder / "other.pub")

    def test_a_manifest_that_was_put_into_the_signature_is_not_taken(
        self, folder: Path, signature: dict[str, Any]
    ) -> None:
        altered = MANIFEST.replace(b"home", b"away")
        unsigned = sign_manifest(altered, folder / "key.pem", None)["dsseEnvelope"]["payload"]
        signature["dsseEnvelope"]["payload"] = unsigned
        with pytest.raises(StageFailed, check=coded("signature-not-valid")):
            verify_manifest(altered, signature, folder / "key.pub")

    def test_a_signature_that_leaves_the_manifest_out_is_not_taken(self, folder: Path) -> None:
        """Without slmops's own check this passes for every manifest: the library skips files that it names."""
        from model_signing import hashing, signing, verifying

        empty = folder / "empty"
        empty.mkdir()
        (empty / "manifest.json").write_bytes(b"anything")
        leave_out = hashing.Config().set_ignored_paths(paths=["manifest.json"])
        signer = signing.Config().use_elliptic_key_signer(private_key=folder / "key.pem")
        signer.set_hashing_config(leave_out).sign(empty, folder / "made.json")
        (empty / "manifest.json").write_bytes(MANIFEST)
        verifying.Config().use_elliptic_key_verifier(public_key=folder / "key.pub").verify(empty, folder / "made.json")
        with pytest.raises(StageFailed, check=coded("signature-of-other-manifest")):
            verify_manifest(MANIFEST, json.loads((folder / "made.json").read_bytes()), folder / "key.pub")

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (["mediaType"], "application/json"),
            (["mediaType"], None),
            (["extra"], 1),
            (["verificationMaterial"], {}),
            (["verificationMaterial"], None),
            (["verificationMaterial", "publicKey"], {}),
            (["verificationMaterial", "publicKey", "hint"], "0" * 64),
            (["verificationMaterial", "publicKey", "hint"], ""),
            (["verificationMaterial", "publicKey", "hint"], None),
            (["verificationMaterial", "tlogEntries"], [{}]),
            (["verificationMaterial", "tlogEntries"], 1),
            (["dsseEnvelope"], {}),
            (["dsseEnvelope"], []),
            (["dsseEnvelope", "payload"], ""),
            (["dsseEnvelope", "payload"], 3),
            (["dsseEnvelope", "payload"], "not base64!"),
            (["dsseEnvelope", "payload"], "ü"),
            (["dsseEnvelope", "payload"], base64.b64encode(b"\xff").decode()),
            (["dsseEnvelope", "payload"], base64.b64encode(b"[" * 100_000).decode()),
            (["dsseEnvelope", "payload"], encoded([])),
            (["dsseEnvelope", "payload"], encoded({"predicate": []})),
            (["dsseEnvelope", "payloadType"], "text/plain"),
            (["dsseEnvelope", "payloadType"], None),
            (["dsseEnvelope", "signatures"], []),
            (["dsseEnvelope", "signatures"], [{}]),
            (["dsseEnvelope", "signatures", 0, "sig"], ""),
            (["dsseEnvelope", "signatures", 0, "sig"], "AAAA"),
            (["dsseEnvelope", "signatures", 0, "sig"], {1.5: float("nan")}),
        ],
    )
    def test_an_altered_bundle_is_refused(
        self, path: list[Any], value: Any, folder: Path, signature: dict[str, Any], capfd: pytest.CaptureFixture[str]
    ) -> None:
        altered = copy.deepcopy(signature)
        functools.reduce(lambda part, step: part[step], path[:-1], altered)[path[-1]] = value
        with pytest.raises(StageFailed, check=lambda error: error.code.startswith("signature-")):
            verify_manifest(MANIFEST, altered, folder / "key.pub")
        assert capfd.readouterr() == ("", "")  # the library prints a warning where the key is not named

    def test_a_bundle_with_a_part_missing_is_refused(self, folder: Path, signature: dict[str, Any]) -> None:
        paths = [["mediaType"], ["verificationMaterial"], ["dsseEnvelope"], ["verificationMaterial", "publicKey"]]
        paths += [["verificationMaterial", "publicKey", "hint"], ["dsseEnvelope", "payload"]]
        paths += [["dsseEnvelope", "payloadType"], ["dsseEnvelope", "signatures"]]
        for *parents, last in paths:
            altered = copy.deepcopy(signature)
            del functools.reduce(lambda part, step: part[step], parents, altered)[last]
            with pytest.raises(StageFailed):
                verify_manifest(MANIFEST, altered, folder / "key.pub")

    @pytest.mark.parametrize("value", [{}, [], None, "text", 1])
    def test_what_is_no_bundle_at_all_is_refused(self, value: Any, folder: Path) -> None:
        with pytest.raises(StageFailed, check=coded("signature-malformed")):
            verify_manifest(MANIFEST, value, folder / "key.pub")

    def test_every_changed_character_of_the_signed_parts_is_found(
        self, folder: Path, signature: dict[str, Any]
    ) -> None:
        envelope = signature["dsseEnvelope"]
        for holder, field in ((envelope, "payload"), (envelope["signatures"][0], "sig")):
            whole = holder[field]
            content = base64.b64decode(whole)
            for position in range(0, len(content), 7):
                altered = bytearray(content)
                altered[position] ^= 1
                holder[field] = base64.b64encode(altered).decode()
                with pytest.raises(StageFailed):
                    verify_manifest(MANIFEST, signature, folder / "key.pub")
            holder[field] = whole
        verify_manifest(MANIFEST, signature, folder / "key.pub")


def use_private(path: Path) -> None:
    sign_manifest(MANIFEST, path, None)


def use_public(path: Path) -> None:
    made = {"dsseEnvelope": {}}
    verify_manifest(MANIFEST, made, path)


BODY = private_pem(KEY).splitlines()[1]
DAMAGED = b"-----BEGIN %s KEY-----\nAAAA\n-----END %s KEY-----\n"


class TestKeys:
    @pytest.mark.parametrize(
        ("use", "content", "refused"),
        [
            (use_private, b"", coded("key-of-other-role", "no key in PEM form")),
            (use_private, b"\x30\x81\x00", coded("key-of-other-role", "no key in PEM form")),
            (use_private, BODY, coded("key-of-other-role", "no key in PEM form")),
            (use_private, public_pem(KEY), coded("key-of-other-role", "has a public key")),
            (use_private, b"-----BEGIN CERTIFICATE-----", coded("key-of-other-role", "has a certificate")),
            (use_private, private_pem(RSA), coded("key-kind", "kind RSA")),
            (use_private, private_pem(RSA, form=SEC1), coded("key-kind", "kind RSA")),
            (use_private, private_pem(ED25519), coded("key-kind", "kind Ed25519")),
            (use_private, private_pem(SECP256K1), coded("key-kind", "kind secp256k1")),
            (use_private, DAMAGED % (b"PRIVATE", b"PRIVATE"), coded("key-damaged")),
            (use_private, private_pem(KEY)[:-30], coded("key-damaged")),
            (use_public, b"", coded("key-of-other-role", "no key in PEM form")),
            (use_public, private_pem(KEY), coded("key-of-other-role", "has a private key")),
            (use_public, private_pem(KEY, PASSWORD), coded("key-of-other-role", "has a private key")),
            (use_public, private_pem(KEY, form=SEC1), coded("key-of-other-role", "has a private key")),
            (use_public, b"-----BEGIN CERTIFICATE-----", coded("key-of-other-role", "has a certificate")),
            (use_public, public_pem(RSA), coded("key-kind", "kind RSA")),
            (use_public, public_pem(ED25519), coded("key-kind", "kind Ed25519")),
            (use_public, public_pem(SECP256K1), coded("key-kind", "kind secp256k1")),
            (use_public, DAMAGED % (b"PUBLIC", b"PUBLIC"), coded("key-damaged")),
        ],
        ids=lambda value: "content" if isinstance(value, bytes) else None,  # keys are drawn anew by each worker
    )
    def test_a_file_that_is_no_such_key_is_refused(
        self, use: Callable[[Path], None], content: bytes, refused: coded, tmp_path: Path
    ) -> None:
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(BadInput, check=refused) as caught:
            use(tmp_path / "key")
        assert str(tmp_path / "key") in caught.value.message
        assert caught.value.what_to_do
        assert_tells_no_secret(caught.value)

    @pytest.mark.parametrize("use", [use_private, use_public])
    def test_a_file_that_cannot_be_read_is_refused(
        self, use: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(BadInput, check=coded("key-unreadable", "does not exist")):
            use(folder / "none")
        with pytest.raises(BadInput, check=coded("key-unreadable", "not a file")):
            use(folder)
        with pytest.raises(BadInput, check=coded("key-unreadable", "cannot be read")):
            use(folder / ("x" * 5000))
        with pytest.raises(BadInput, check=coded("key-unreadable", "cannot be read")):
            use(folder / "nul\0")

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(BadInput, check=coded("key-unreadable", "Permission denied")):
            use(folder / "key.pem")

    @pytest.mark.parametrize("use", [use_private, use_public])
    def test_a_key_in_place_of_its_path_is_not_shown(self, use: Callable[[Path], None]) -> None:
        with pytest.raises(BadInput, check=coded("key-in-setting")) as caught:
            use(Path(private_pem(KEY).decode()))
        assert_tells_no_secret(caught.value)

    def test_a_password_is_never_shown(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        sign_manifest(MANIFEST, folder / "locked.pem", PASSWORD)
        (folder / "damaged.pem").write_bytes(private_pem(KEY, PASSWORD).replace(b"A", b"B", 3))
        (folder / "other.pem").write_bytes(private_pem(KEY, "other"))
        for name in ("key.pem", "damaged.pem", "other.pem"):
            with pytest.raises(BadInput) as caught:
                sign_manifest(MANIFEST, folder / name, PASSWORD)
            assert_tells_no_secret(caught.value)
        assert PASSWORD not in caplog.text
        assert BODY.decode() not in caplog.text

    @pytest.mark.parametrize("missing", ["model_signing", "OpenSSL"])
    def test_without_the_library_the_advice_is_to_install_it(
        self, missing: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, missing, None)
        for use, key in ((use_private, "key.pem"), (use_public, "key.pub")):
            with pytest.raises(BadInput, check=coded("signing-missing", missing)) as caught:
                use(folder / key)
            assert caught.value.what_to_do == "pip install 'slmops[signing]'"


def assert_tells_no_secret(error: SlmopsError) -> None:
    told = "".join(traceback.format_exception(error)) + repr(error)
    assert PASSWORD not in told
    assert BODY.decode()[:30] not in told


def model_signing(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class TestPublicCommandLine:
    @pytest.fixture
    def version(self, folder: Path) -> Path:
        version = folder / "version"
        version.mkdir()
        (version / "manifest.json").write_bytes(MANIFEST)
        return version

    def test_it_accepts_our_signature_and_refuses_another_manifest(
        self, version: Path, folder: Path, signature: dict[str, Any]
    ) -> None:
        (folder / "signature.json").write_text(json.dumps(signature, indent=2))
        check = ("verify", "key", version, "--signature", folder / "signature.json", "--public_key", folder / "key.pub")
        done = model_signing(*check)
        assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr
        (version / "manifest.json").write_bytes(MANIFEST + b" ")
        done = model_signing(*check)
        assert done.returncode == 1
        assert "Hash mismatch for 'manifest.json'" in done.stderr

    def test_its_signature_is_accepted_here(self, version: Path, folder: Path) -> None:
        made = folder / "made.json"
        done = model_signing("sign", "key", version, "--signature", made, "--private_key", folder / "key.pem")
        assert done.returncode == 0, done.stderr
        verify_manifest(MANIFEST, json.loads(made.read_bytes()), folder / "key.pub")


GUARDED = """
import json, sys
from pathlib import Path

# urllib3 binds a socket to ::1 when it is imported, to see whether there is IPv6; nothing comes or goes by that.
WATCHED = ("connect", "sendto", "sendmsg", "getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo")
WATCHED = {*(f"socket.{name}" for name in WATCHED), "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event in WATCHED else None)
from slmops.infra.model_signing.signature import sign_manifest, verify_manifest

folder = Path(sys.argv[1])
manifest = b"{}"
signature = sign_manifest(manifest, folder / "locked.pem", sys.argv[2])
verify_manifest(manifest, signature, folder / "key.pub")
quiet = list(seen)
import socket
try:
    socket.create_connection(("localhost", 9), timeout=1)
except OSError:
    pass
print(json.dumps([quiet, sorted(set(seen))]))
"""


def test_nothing_is_connected_resolved_started_or_written_elsewhere(folder: Path, tmp_path: Path) -> None:
    home, aside = tmp_path / "home", tmp_path / "aside"
    home.mkdir()
    aside.mkdir()
    places = {"HOME": str(home), "USERPROFILE": str(home), "TMPDIR": str(aside), "TEMP": str(aside), "TMP": str(aside)}
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(folder), PASSWORD],
        env={**os.environ, **places, "PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    quiet, control = json.loads(done.stdout)
    assert quiet == []
    assert control == ["socket.connect", "socket.getaddrinfo"]
    assert [*home.iterdir(), *aside.iterdir()] == []
