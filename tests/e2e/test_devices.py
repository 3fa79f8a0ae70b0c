"""`slmops pull NAME --foundry-cache DIR`: a version on a device, known to the SDK and to Foundry's cache scan."""

import asyncio
import shutil
from pathlib import Path

import pytest

from slmops.infra.foundry.model_process import ModelProcess
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from tests.e2e.conftest import Slmops
from tests.support.genai_models import build_genai_model
from tests.support.served_models import store_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_dir(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_genai_model(tiny_checkpoint, tmp_path_factory.mktemp("device") / "model", "int4")


def test_a_champion_is_brought_and_replaced(model_dir: Path, tmp_path: Path) -> None:
    slmops, device = Slmops(tmp_path / "home"), tmp_path / "device"
    registry = ModelRegistry(LocalObjectStore(slmops.home / "store"))
    for number in (1, 2):
        store_model(registry, model_dir, tmp_path / f"in{number}", content=str(number))
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"no graph")
    store_model(registry, broken, tmp_path / "in3")

    brought = slmops.json("pull", "home", "--foundry-cache", device)
    assert (brought["version"], brought["model_id"], brought["replaced"]) == (1, "home:1", [])
    assert Path(brought["folder"]) == device / "models/custom/home-champion/v1"
    assert brought["answer"]
    assert not any(path.is_symlink() for path in device.rglob("*"))
    assert slmops.json("pull", "home", "--foundry-cache", device) == brought  # again, with nothing changed

    # What does not load leaves what was there
    refused = slmops.run("pull", "home@3", "--foundry-cache", device, status=1).stderr
    assert "home@3" in refused
    assert [path.name for path in (device / "models/custom/home-champion").iterdir()] == ["v1"]

    after = slmops.json("pull", "home@2", "--foundry-cache", device)
    assert after["replaced"] == ["home:1"]
    assert [path.name for path in (device / "models/custom/home-champion").iterdir()] == ["v2"]

    # Foundry's scan of the cache finds it too: its web service serves what a catalog names and the cache holds.
    async def serve_it() -> None:
        process = await ModelProcess.start(device, "home:2", 1, deadline_s=120, log_path=tmp_path / "log")
        await process.stop()

    asyncio.run(serve_it())
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in slmops.run("pull", "home", "--foundry-cache", file, status=2).stderr
