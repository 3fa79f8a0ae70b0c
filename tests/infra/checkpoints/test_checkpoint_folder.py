"""Only the headers of a checkpoint folder are read; any damage there is bad input."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from slmops.infra.checkpoints.folder import (
    WEIGHTS,
    WEIGHTS_INDEX,
    TensorHeader,
    read_chat_template,
    read_json,
    read_tensor_headers,
)
from slmops.infra.errors import BadInput
from tests.support.errors import coded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / "model-1.safetensors")
    save_file({"b": np.zeros((4,), np.float16)}, folder / "model-2.safetensors")
    write_index(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_headers_of_one_file(tiny_checkpoint: Path) -> None:
    headers = read_tensor_headers(tiny_checkpoint)
    assert headers["model.embed_tokens.weight"] == TensorHeader((512, 64), "BF16")
    weights = (tiny_checkpoint / WEIGHTS).stat().st_size
    assert 0 < weights - sum(header.size_bytes for header in headers.values()) < 10_000


def test_headers_of_shards(folder: Path) -> None:
    assert read_tensor_headers(folder) == {"a": TensorHeader((2, 3), "F32"), "b": TensorHeader((4,), "F16")}


def test_a_link_to_a_file_elsewhere_is_followed_as_hugging_faces_cache_needs_it(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "1"
    blob.parent.mkdir()
    (folder / "model-1.safetensors").rename(blob)
    (folder / "model-1.safetensors").symlink_to(blob)
    assert set(read_tensor_headers(folder)) == {"a", "b"}


class TestIndex:
    @pytest.mark.parametrize(
        ("weight_map", "refused"),
        [
            ({"a": "model-1.safetensors", "b": "model-3.safetensors"}, coded("shard-missing", "model-3.safetensors")),
            ({"a": "model-1.safetensors", "c": "model-1.safetensors"}, coded("tensor-without-file", "lists c,")),
            ({"a": "../model-1.safetensors"}, coded("index-names-foreign-file")),
            ({"a": "/etc/passwd"}, coded("index-names-foreign-file")),
            ({"a": "sub/model-1.safetensors"}, coded("index-names-foreign-file")),
            ({"a": ""}, coded("index-names-foreign-file")),
            ({"a": ".."}, coded("shard-missing")),
            ({"a": 3}, coded("index-not-valid")),
            ({"a": ["model-1.safetensors"]}, coded("index-not-valid")),
            ({}, coded("index-not-valid")),
            (["model-1.safetensors"], coded("index-not-valid")),
            (None, coded("index-not-valid")),
        ],
    )
    def test_one_that_does_not_fit_is_refused(self, weight_map: object, refused: coded, folder: Path) -> None:
        write_index(folder, weight_map)
        (folder.parent / "model-1.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
        with pytest.raises(BadInput, check=refused):
            read_tensor_headers(folder)

    def test_a_damaged_one_is_refused(self, folder: Path) -> None:
        (folder / WEIGHTS_INDEX).write_text('{"weight_map": {')
        with pytest.raises(BadInput, check=coded("file-not-json")):
            read_tensor_headers(folder)

    def test_a_cut_off_shard_is_refused(self, folder: Path) -> None:
        shard = folder / "model-2.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(BadInput, check=coded("weights-damaged", "model-2.safetensors")):
            read_tensor_headers(folder)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_weights_cut_off_anywhere_are_refused(share: float, tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = (tiny_checkpoint / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadInput, check=coded("weights-damaged")):
        read_tensor_headers(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1, -2])
def test_weights_cut_off_at_the_edges_are_refused(length: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes((tiny_checkpoint / WEIGHTS).read_bytes()[:length])
    with pytest.raises(BadInput, check=coded("weights-damaged")):
        read_tensor_headers(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: pickle.dumps({"weight": [1, 2, 3]}),
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_damaged_weights_are_refused(damage: Callable[[bytes], bytes], tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(damage((tiny_checkpoint / WEIGHTS).read_bytes()))
    with pytest.raises(BadInput, check=coded("weights-damaged")):
        read_tensor_headers(tmp_path)


def test_no_tensor_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, check=coded("shard-missing", WEIGHTS)):
        read_tensor_headers(tmp_path)
    save_file({}, tmp_path / WEIGHTS)
    with pytest.raises(BadInput, check=coded("no-tensors")):
        read_tensor_headers(tmp_path)


class Explosive:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickled_weights_are_refused_and_not_loaded(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Explosive(tmp_path / "trace")))
    with pytest.raises(BadInput, check=coded("weights-pickled", name)) as caught:
        read_tensor_headers(folder)
    assert "safetensors" in caught.value.what_to_do
    assert not (tmp_path / "trace").exists()


class TestJson:
    @pytest.mark.parametrize(
        ("content", "refused"),
        [
            (b"{", coded("file-not-json")),
            (b"", coded("file-not-json")),
            (b"\xff\xfe", coded("file-not-json")),
            (b"[" * 200_000, coded("file-not-json")),
            (b'{"a": ' + b"9" * 10_000 + b"}", coded("file-not-json")),
            (b"[1]", coded("file-not-object")),
            (b"null", coded("file-not-object")),
        ],
        ids=["cut", "empty", "not-utf-8", "deep", "huge-number", "list", "null"],
    )
    def test_what_is_no_object_is_refused(self, content: bytes, refused: coded, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(BadInput, check=refused):
            read_json(tmp_path / "config.json")

    def test_a_missing_file_and_a_folder_in_its_place(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, check=coded("file-missing", "config.json")):
            read_json(tmp_path / "config.json")
        (tmp_path / "config.json").mkdir()
        with pytest.raises(BadInput, check=coded("file-unreadable")):
            read_json(tmp_path / "config.json")


class TestChatTemplate:
    def test_the_tokenizers_own(self, tiny_checkpoint: Path) -> None:
        assert "<|im_start|>" in str(read_chat_template(tiny_checkpoint))

    def test_where_it_is_looked_for(self, tmp_path: Path) -> None:
        assert read_chat_template(tmp_path) is None
        config = tmp_path / "tokenizer_config.json"
        config.write_text("{}")
        assert read_chat_template(tmp_path) is None
        config.write_text(json.dumps({"chat_template": "inline"}))
        assert read_chat_template(tmp_path) == "inline"
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
        assert read_chat_template(tmp_path) == "json"
        (tmp_path / "chat_template.jinja").write_text("größer", "utf-8")
        assert read_chat_template(tmp_path) == "größer"

    def test_of_several_the_one_named_default(self, tmp_path: Path) -> None:
        templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
        assert read_chat_template(tmp_path) == "plain"
        for odd in ([], ["plain"], templates[:1], ""):
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": odd}))
            assert read_chat_template(tmp_path) is None

    def test_an_empty_one_counts_as_missing(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_text("")
        assert read_chat_template(tmp_path) is None

    @pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json", "chat_template.jinja"])
    def test_one_that_cannot_be_read_is_refused(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"\xff{")
        with pytest.raises(
            BadInput, check=coded("file-not-utf8" if name.endswith(".jinja") else "file-not-json", name)
        ):
            read_chat_template(tmp_path)

    def test_reading_changes_nothing(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
        before = {path.name: path.read_bytes() for path in copy.iterdir()}
        read_chat_template(copy)
        read_tensor_headers(copy)
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
