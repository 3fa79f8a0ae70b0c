import json
import os

import pytest

from slmops.infra.errors import StageFailed
from slmops.infra.foundry.model_folder import model_folder, remove_model_folder, write_model_folder
from tests.support.errors import coded

DESCRIPTION = {"Name": "home-int4-generic-cpu:1", "Description": "Übung"}
CARD = "# home\n\nÜbung\n"


@pytest.fixture
def sources(tmp_path):
    blobs = tmp_path / "store" / "blobs"
    blobs.mkdir(parents=True)
    files = {"genai_config.json": b"{}", "model.onnx": b"graph", "model.onnx.data": b"weights" * 100, "sub/vocab": b"v"}
    sources = {}
    for number, (name, content) in enumerate(files.items()):
        sources[name] = blobs / str(number)
        sources[name].write_bytes(content)
    return sources


def write(tmp_path, sources, version=1, model_card=CARD, **changes):
    return write_model_folder(
        tmp_path / "foundry",
        "home",
        "int4",
        version,
        sources=sources,
        inference_model=DESCRIPTION | changes,
        model_card=model_card,
    )


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def inodes(folder):
    return {path: path.stat().st_ino for path in folder.rglob("*")}


def test_folder_holds_every_source_and_the_description_as_hard_links(tmp_path, sources):
    folder = write(tmp_path, sources)
    assert folder == tmp_path / "foundry" / "models" / "custom" / "home-int4" / "v1"
    found = contents(folder)
    assert json.loads(found.pop("inference_model.json")) == DESCRIPTION
    assert found.pop("README.md").decode() == CARD
    assert found == {name: source.read_bytes() for name, source in sources.items()}
    assert all((folder / name).samefile(source) for name, source in sources.items())
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert {path.name for path in (tmp_path / "foundry").iterdir()} == {"models"}


def test_a_source_behind_a_symbolic_link_is_not_linked_symbolically(tmp_path, sources):
    link = tmp_path / "link"
    link.symlink_to(sources["model.onnx"])
    folder = write(tmp_path, sources | {"model.onnx": link})
    assert not (folder / "model.onnx").is_symlink()
    assert (folder / "model.onnx").read_bytes() == b"graph"


def test_files_are_copied_where_no_hard_link_can_be_made(tmp_path, sources, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = write(tmp_path, sources)
    assert contents(folder).keys() == sources.keys() | {"inference_model.json", "README.md"}
    before = inodes(folder)
    assert inodes(write(tmp_path, sources)) == before


def test_a_complete_folder_is_not_changed(tmp_path, sources):
    before = inodes(write(tmp_path, sources))
    assert inodes(write(tmp_path, sources)) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.onnx").unlink(),
        lambda folder: ((folder / "model.onnx").unlink(), (folder / "model.onnx").write_bytes(b"grapX")),
        lambda folder: (folder / "extra").write_bytes(b""),
        lambda folder: (folder / "inference_model.json").write_text("{"),
        lambda folder: (folder / "genai_config.json").rename(folder / "genai_config.json.part"),
    ],
    ids=["missing", "changed", "extra", "description", "broken off before the last step"],
)
def test_a_damaged_folder_is_replaced(tmp_path, sources, damage):
    expected = contents(write(tmp_path, sources))
    damage(model_folder(tmp_path / "foundry", "home", "int4", 1))
    assert contents(write(tmp_path, sources)) == expected
    assert sources["model.onnx"].read_bytes() == b"graph"


def test_a_new_description_replaces_the_folder(tmp_path, sources):
    write(tmp_path, sources)
    folder = write(tmp_path, sources, Description="other")
    assert json.loads((folder / "inference_model.json").read_text("utf-8"))["Description"] == "other"


def test_a_failed_write_leaves_nothing_that_foundry_sees(tmp_path, sources):
    with pytest.raises(StageFailed, check=coded("model-folder-not-written")):
        write(tmp_path, sources | {"model.onnx.data": tmp_path / "nowhere"})
    assert not list(tmp_path.glob("foundry/**/*.json"))
    assert not list(tmp_path.glob("foundry/.*"))


@pytest.mark.parametrize("name", ["../model.onnx", "/model.onnx", "C:model.onnx", "a\\b", ""])
def test_a_source_with_another_name_than_a_plain_relative_one_is_refused(tmp_path, sources, name):
    with pytest.raises(StageFailed, check=coded("model-file-name-not-valid", repr(name))):
        write(tmp_path, {name: sources["model.onnx"], **sources})


def test_a_model_without_its_config_is_refused(tmp_path, sources):
    del sources["genai_config.json"]
    with pytest.raises(StageFailed, check=coded("genai-config-missing")):
        write(tmp_path, sources)


def test_removal_keeps_other_versions_and_the_sources(tmp_path, sources):
    first, second = write(tmp_path, sources), write(tmp_path, sources, version=2)
    foundry = tmp_path / "foundry"
    assert remove_model_folder(foundry, "home", "int4", 1)
    assert not first.exists()
    assert second.exists()
    assert not remove_model_folder(foundry, "home", "int4", 1)
    assert remove_model_folder(foundry, "home", "int4", 2)
    assert not second.parent.exists()
    assert second.parent.parent.exists()
    assert sources["model.onnx.data"].read_bytes() == b"weights" * 100


def test_a_new_model_card_leaves_the_model_in_place(tmp_path, sources):
    folder = write(tmp_path, sources)
    before = inodes(folder)
    assert write(tmp_path, sources, model_card="# other\n") == folder
    after = inodes(folder)
    assert (folder / "README.md").read_text("utf-8") == "# other\n"
    assert {path for path in before if before[path] != after[path]} == {folder / "README.md"}
    assert {path.name for path in (tmp_path / "foundry").iterdir()} == {"models"}


def test_the_sources_own_read_me_gives_way_to_the_model_card(tmp_path, sources):
    sources["README.md"] = sources["sub/vocab"]
    assert (write(tmp_path, sources) / "README.md").read_text("utf-8") == CARD
