"""Foreign models: code that they name is not run, and their own evidence makes no champion.

The library is a real one, which leaves a mark wherever it is loaded.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.infra.storage.archive import export_version
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.registry import ModelRegistry
from tests.e2e.conftest import Slmops
from tests.support.genai_models import build_genai_model
from tests.support.served_models import serving, store_model

pytestmark = pytest.mark.slow

LIBRARY = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { fclose(fopen("%s", "a")); }
"""


@pytest.fixture(scope="module")
def model_dir(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_genai_model(tiny_checkpoint, tmp_path_factory.mktemp("foreign") / "model", "int4")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that the library writes when it is loaded."""
    return tmp_path / "ran"


@pytest.fixture
def hostile(model_dir: Path, mark: Path, tmp_path: Path) -> Path:
    """A working model that names a library of its own folder."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "hostile"))
    source = tmp_path / "library.c"
    source.write_text(LIBRARY % mark)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "ops.so", source], check=True)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "ops.so"
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def slmops(tmp_path: Path, server: str) -> Slmops:
    return Slmops(tmp_path / "home", {"PREFECT_API_URL": server})


def own_store(slmops: Slmops) -> ModelRegistry:
    return ModelRegistry(LocalObjectStore(slmops.home / "store"))


@pytest.fixture
def strangers(tmp_path: Path) -> ModelRegistry:
    """A foreign store."""
    return ModelRegistry(LocalObjectStore(tmp_path / "strangers"))


def assert_refused(slmops: Slmops, status: int, said: str, *command: str | Path, **extra: str) -> None:
    """The command ends with one sentence on what was found, and one on what to do."""
    error = slmops.run(*command, status=status, **extra).stderr
    assert said in error
    assert "Traceback" not in error
    assert "refused before a runtime opens it" in error


def test_a_given_folder_runs_no_library(hostile: Path, mark: Path, slmops: Slmops) -> None:
    command = f"import onnxruntime_genai as og; og.Model({str(hostile)!r})"
    subprocess.run([sys.executable, "-c", command], check=False, capture_output=True)
    assert mark.exists(), "the runtime alone does not load the library: this test proves nothing"
    mark.unlink()

    assert_refused(slmops, 2, "custom_ops_library", "deploy", hostile, "--name", "home")
    assert not mark.exists()
    assert slmops.json("list") == {"models": []}
    assert list(own_store(slmops).objects.entries("blobs")) == []


@pytest.mark.parametrize("way", ["import", "pull"])
def test_a_copied_version_runs_no_library(
    way: str, hostile: Path, mark: Path, slmops: Slmops, strangers: ModelRegistry, tmp_path: Path
) -> None:
    manifest = store_model(strangers, hostile, tmp_path / "in")
    archive = tmp_path / "home.tar"
    export_version(strangers, manifest, archive)
    address = (tmp_path / "strangers").as_uri()
    if way == "import":
        assert_refused(slmops, 2, "custom_ops_library", "import", archive)
    else:
        assert_refused(slmops, 2, "custom_ops_library", "pull", "home@1", SLMOPS_STORE__URI=address)
    assert not mark.exists()
    assert slmops.json("list") == {"models": []}
    assert list(own_store(slmops).objects.entries("blobs")) == []


def test_an_existing_version_runs_no_library(hostile: Path, mark: Path, slmops: Slmops, tmp_path: Path) -> None:
    """An older slmops imported it; now no command opens it."""
    store_model(own_store(slmops), hostile, tmp_path / "in")
    assert_refused(slmops, 1, "custom_ops_library", "pull", "home", "--foundry-cache", tmp_path / "device")
    assert_refused(slmops, 1, "custom_ops_library", "serve", "--port", "0")
    assert_refused(slmops, 1, "custom_ops_library", "benchmark", "home@1")
    assert not mark.exists()
    assert not list((tmp_path / "device").rglob("genai_config.json"))


def packed(registry: ModelRegistry, manifest: Manifest, file: Path) -> Path:
    export_version(registry, manifest, file)
    return file


def test_copied_evidence_makes_no_champion(
    model_dir: Path, slmops: Slmops, strangers: ModelRegistry, tmp_path: Path
) -> None:
    """It says that it was deployed, selected and registered. A server that follows every name does not load it."""
    store_model(own_store(slmops), model_dir, tmp_path / "own", name="own")
    forged = store_model(strangers, model_dir, tmp_path / "forged", content="forged")
    archive = packed(strangers, forged, tmp_path / "home.tar")
    with serving(slmops.home, environment={"SLMOPS_SERVE__FOLLOW_S": "0.2"}) as server:
        told = slmops.run("import", archive).stdout
        assert "Its figures are claims of its origin." in told
        assert "slmops regate home@1" in told
        (model,) = [model for model in slmops.json("list")["models"] if model["name"] == "home"]
        assert (model["aliases"], model["says_origin"]) == ([], True)
        assert "says its origin" in slmops.run("list").stdout
        assert slmops.json("show", "home@1")["says_origin"]
        assert "says its origin" in slmops.run("show", "home@1").stdout
        time.sleep(3)
        listed = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert {model["id"].partition(":")[0] for model in listed} == {"own"}
    assert "home has no champion" in slmops.run("serve", "home", "--port", "0", status=2).stderr
    # Nor does a second copy, or the champion of the store that it comes from.
    slmops.run("import", archive)
    slmops.run("pull", "home@champion", SLMOPS_STORE__URI=(tmp_path / "strangers").as_uri())
    assert own_store(slmops).aliases("home") == {}


def test_a_signature_by_a_trusted_key_makes_one(
    model_dir: Path, slmops: Slmops, strangers: ModelRegistry, tmp_path: Path
) -> None:
    manifest = store_model(strangers, model_dir, tmp_path / "in")
    keys: dict[str, dict[str, str]] = {}
    for owner in ("team", "stranger"):
        key = ec.generate_private_key(ec.SECP256R1())
        private, public = tmp_path / f"{owner}.pem", tmp_path / f"{owner}.pub"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        public.write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        keys[owner] = {
            "SLMOPS_STORE__SIGNING_KEY": str(private),
            "SLMOPS_STORE__VERIFICATION_KEY": str(public),
        }
    address = (tmp_path / "strangers").as_uri()
    Slmops(tmp_path / "other").run("sign", "home@1", SLMOPS_STORE__URI=address, **keys["team"])
    archive = packed(strangers, manifest, tmp_path / "home.tar")

    slmops.run("import", archive)
    slmops.run("import", archive, **keys["stranger"])
    assert own_store(slmops).aliases("home") == {}
    slmops.run("import", archive, **keys["team"])
    assert own_store(slmops).aliases("home") == {"champion": 1}
    assert "signed by a key that is trusted" in own_store(slmops).champion_history("home")[0].reason
