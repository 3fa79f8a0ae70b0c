"""A store whose evidence is damaged: each command says in one sentence which file it is and why, and writes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.deployments.cli import app as cli
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.versions.catalog import StoreCatalog
from slmops.tasks.versions.serving import StoredModels

BEFORE = Path(__file__).parents[2] / "data" / "store_before"
DEPLOYED = "models/home/2/evidence/deploy-20261129230136346651-9724c7ed.json"
SELECTED = "models/home/2/evidence/selection-20261129230132731152-109b7fd0.json"


def changed(**fields: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        record = json.loads(data)
        record["content"] |= fields
        return json.dumps(record).encode()

    return change


def without(field: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        record = json.loads(data)
        del record["content"]["variants"][0][field]
        return json.dumps(record).encode()

    return change


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-100],
    "no JSON": lambda data: b"\x00" * len(data),
    "no record": lambda data: b"{}",
    "a list": lambda data: b"[1, 2]",
    "variants of a wrong type": changed(variants="int4"),
    "a variant without its precision": without("precision"),
    "a variant without its status": without("status"),
    "metrics of a wrong type": changed(variants=[{"precision": "int4", "status": "registered", "metrics": [1]}]),
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    store = tmp_path / "home" / "store"
    shutil.copytree(BEFORE, store, ignore=shutil.ignore_patterns("asked"))
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLMOPS_STORE__URI", (tmp_path / "team").as_uri())
    return store


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMMANDS = (("list",), ("show", "home@2"), ("diff", "home@1", "home@2"), ("push", "home@2"))


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_damaged_record_is_one_sentence_with_the_file_and_what_to_do(
    command: tuple[str, ...], how: str, store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(store / DEPLOYED, DAMAGE[how])
    if command[0] != "push":
        monkeypatch.setenv("SLMOPS_STORE__URI", store.as_uri())
    before = files_below(store.parent)
    assert cli.run(command) == 1
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    (told,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert Path(DEPLOYED).name in told
    assert "home@2" in told
    assert "is not valid" in told
    assert "restore it" in err
    assert files_below(store.parent) == before
    assert not (store.parents[1] / "team").exists()
    assert cli.run([*command, "--json"]) == 1
    assert Path(DEPLOYED).name in json.loads(capfd.readouterr().out)["error"]["message"]


def test_the_other_versions_are_listed(
    store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLMOPS_STORE__URI", store.as_uri())
    damage(store / DEPLOYED, DAMAGE["truncated"])
    assert cli.run(["list"]) == 1
    assert "home@1" in capfd.readouterr().out


def test_the_other_models_are_listed(
    store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLMOPS_STORE__URI", store.as_uri())
    broken = store / "models/another/1/manifest.json"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"a":')
    assert cli.run(["list"]) == 1
    out, err = capfd.readouterr()
    assert "home@1" in out
    assert "The manifest of another@1 is not valid" in err
    assert cli.run(["list", "home"]) == 0


@pytest.mark.parametrize("how", ["truncated", "variants of a wrong type"])
def test_the_catalog_leaves_a_damaged_version_out(how: str, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(store / DEPLOYED, DAMAGE[how])
    catalog = StoreCatalog(open_registry(Settings(store={"uri": store.as_uri()})))
    assert {model.version for model in catalog.models()} == {1}
    assert Path(DEPLOYED).name in caplog.text


def test_serving_reports_damage_and_continues_with_the_cached_version(store: Path) -> None:
    settings = Settings(store={"uri": store.as_uri()})
    models = StoredModels(open_registry(settings), settings)
    served = models.champion("home")
    damage(store / SELECTED, changed(selected=["int4"]))
    assert models.champion("home") == served
