"""GGUF files that are truncated, have wrong lengths or are of another kind are refused with little memory."""

import json
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from slmops.infra.errors import BadInput
from slmops.infra.gguf.architectures import config_of, tensors_of
from slmops.infra.gguf.conversion import convert
from slmops.infra.gguf.file import read_gguf
from slmops.infra.gguf.tokenizer import check_tokenizer, tokenizer_of
from tests.support.errors import coded

TOKENS = [*(chr(code) for code in range(33, 127)), "ab"]


def write_gguf(path: Path, architecture: str = "llama", merge: str = "a b", **changes: object) -> Path:
    """Write a complete model of two layers of 32; `changes` are metadata without the architecture's name."""
    import numpy as np

    writer = GGUFWriter(path, architecture)
    sizes: dict[str, object] = {
        **{"context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 64},
        **{"attention.head_count": 2, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5},
    }
    for key, value in (sizes | changes).items():
        name = key if key.startswith(("tokenizer.", "split.", "general.")) else f"{architecture}.{key}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name, value)  # type: ignore[operator]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges([merge])
    writer.add_chat_template("{{ messages }}")
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    for name, shape in (tensors | {"token_embd": (len(TOKENS), 32), "output_norm": (32,)}).items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


def understood(path: Path) -> None:
    """All facts that are read from a file before its conversion."""
    file = read_gguf(path)
    config_of(file)
    tensors_of(file)
    check_tokenizer(file)
    Tokenizer.from_str(json.dumps(tokenizer_of(file)))


def test_a_complete_file_is_read(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    understood(path)


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.2, 0.9, 0.9999])
def test_a_file_that_is_cut_off(tmp_path: Path, whole: bytes, share: float) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BadInput, check=coded("gguf-cut-off")):
        read_gguf(path)


@pytest.mark.parametrize(
    ("at", "form", "value", "code"),
    [
        (0, "<4s", b"ggml", "gguf-not-valid"),  # the magic
        (4, "<I", 1, "gguf-not-valid"),  # the version
        (4, "<I", 3 << 24, "gguf-not-valid"),  # of the other byte order
        (8, "<Q", 2**60, "gguf-not-valid"),  # the count of tensors
        (16, "<Q", 2**60, "gguf-cut-off"),  # the count of values
        (24, "<Q", 2**63, "gguf-cut-off"),  # the first key's length
    ],
)
def test_a_header_with_wrong_values(tmp_path: Path, whole: bytes, at: int, form: str, value: object, code: str) -> None:
    content = bytearray(whole)
    struct.pack_into(form, content, at, value)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(BadInput, check=coded(code)):
        read_gguf(path)


def test_an_array_that_claims_to_be_longer_than_any_memory_takes_none(tmp_path: Path, whole: bytes) -> None:
    """The library's own reader would continue until the memory is exhausted."""
    content = bytearray(whole)
    at = whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    for element, size in ((0, 1), (8, 8)):  # of bytes, of texts
        struct.pack_into("<IQ", content, at, element, 2**62 // size)
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(BadInput, check=coded("gguf-cut-off")):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 8))
@example(seed=0, count=1)
def test_any_damage_to_the_header_is_refused_or_harmless(tmp_path: Path, whole: bytes, seed: int, count: int) -> None:
    content, chosen = bytearray(whole), random.Random(seed)
    for _ in range(count):
        content[chosen.randrange(3000)] = chosen.randrange(256)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    try:
        understood(path)
    except BadInput as error:
        assert error.what_to_do


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"architecture": "mamba"}, "gguf-architecture"),
        ({"expert_count": 4}, "gguf-architecture"),
        ({"split.count": 3}, "gguf-part"),
        ({"embedding_length": "wide"}, "gguf-not-valid"),
        ({"block_count": 2**31}, "gguf-unfit"),
        ({"attention.head_count": 0}, "gguf-unfit"),
        ({"attention.head_count_kv": 3}, "gguf-unfit"),
        ({"rope.dimension_count": 8}, "gguf-unfit"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "gguf-tokenizer"),
        ({"merge": "b c"}, "gguf-tokenizer"),
    ],
)
def test_a_model_that_cannot_be_converted(tmp_path: Path, changes: dict[str, object], code: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", **changes)  # type: ignore[arg-type]
    with pytest.raises(BadInput, check=coded(code)):
        understood(path)


def test_two_tensors_in_the_same_place(tmp_path: Path, whole: bytes) -> None:
    """A small file could otherwise lead to a large one."""
    content = bytearray(whole)
    second = whole.index(b"blk.0.attn_k.weight") + len("blk.0.attn_k.weight") + 4 + 16 + 4
    struct.pack_into("<Q", content, second, 0)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(BadInput, check=coded("gguf-not-valid")):
        read_gguf(path)


def test_weights_that_are_not_finite(tmp_path: Path, whole: bytes) -> None:
    content = bytearray(whole)
    content[-4:] = struct.pack("<f", float("nan"))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    convert(path, tmp_path / "as it is", lambda done, total, what: None)  # F32 keeps its bits; the gate looks at them
    assert (tmp_path / "as it is" / "model.safetensors").is_file()
