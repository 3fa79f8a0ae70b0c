"""Files of a checkpoint or a store that lie, are nested too deep or are no files of their kind: a sentence each."""

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slmops.infra.checkpoints.folder import read_tensor_headers
from slmops.infra.errors import LONGEST_MESSAGE, SlmopsError
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import parse_foreign_manifest
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.exams.decoding import settle_decoding
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.versions import store_version

QUICK = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "model.safetensors.index.json", "adapter_config.json"),
    *("genai_config.json", "chat_template.jinja", "vocab.json", "eval.jsonl", "quantize_config.json"),
)
DEPTHS = st.sampled_from([10, 500, 1500, 100_000])
HUGE = st.sampled_from(
    ["9" * 5000, "-" + "9" * 400, "1e400", "-1e999", "1" + "0" * 308, "0." + "1" * 2000, "NaN", "-0"]
)
TEXTS = st.text(max_size=6) | st.sampled_from(["\ud800", "\0", "\u202e", "a" * 100_000, "{{ 1 }}", "{% for", "../x"])
KEYS = st.sampled_from(
    (
        *("architectures", "model_type", "chat_template", "eos_token", "bos_token_id", "eos_token_id", "weight_map"),
        *("model", "vocab", "merges", "added_tokens", "pre_tokenizer", "decoder", "type", "content", "id", "special"),
        *("extra_special_tokens", "added_tokens_decoder", "temperature", "top_p", "metadata", "name", "template"),
    )
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def written(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


JSON_BYTES = st.one_of(
    VALUES.map(written),
    st.binary(max_size=40),
    DEPTHS.map(lambda depth: b"[" * depth),
    DEPTHS.map(lambda depth: b'{"architectures":' * depth + b"1" + b"}" * depth),
    DEPTHS.map(lambda depth: b'{"chat_template":' + b"[" * depth + b"]" * depth + b"}"),
    st.tuples(KEYS, HUGE).map(lambda pair: f'{{"{pair[0]}": {pair[1]}}}'.encode()),
    VALUES.map(lambda value: b"\xef\xbb\xbf" + written(value)),
    VALUES.map(lambda value: json.dumps(value).encode("utf-16")),
    st.just(b'{"model_type": "qwen2", "model_type": 5}'),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("hostile") / "checkpoint", "qwen2")


def inspect(checkpoint: Path) -> None:
    inspect_checkpoint(checkpoint)
    settle_decoding(checkpoint, {})


def ends_in_an_answer_or_a_sentence(path: Path, content: bytes, read: Callable[[], object]) -> None:
    before = path.read_bytes() if path.is_file() else None
    try:
        path.write_bytes(content)
        read()
    except SlmopsError as error:
        assert error.message.strip().endswith((".", "…"))
        assert "\n" not in error.message
        assert len(error.message) <= LONGEST_MESSAGE
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


@QUICK
@example(file="config.json", content=b'{"architectures":' * 500 + b"1" + b"}" * 500, merged=False)
@given(file=st.sampled_from(JSON_FILES), content=JSON_BYTES, merged=st.booleans())
def test_a_json_file_of_a_checkpoint(checkpoint: Path, file: str, content: bytes, merged: bool) -> None:
    """A whole file, or an object whose fields replace those of the file."""
    path = checkpoint / file
    if merged and path.is_file():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            content = json.dumps(json.loads(path.read_bytes()) | json.loads(content)).encode()
    ends_in_an_answer_or_a_sentence(path, content, lambda: inspect(checkpoint))


NUMBERS = st.integers(-3, 200) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30])
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "F4", "Q4", "", 5, None]),
        "shape": st.lists(NUMBERS, max_size=4) | VALUES,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | VALUES,
    },
)
NAMES = st.sampled_from(["model.embed_tokens.weight", "lm_head.weight", "__metadata__", "a", "\0", "../a"])
HEADERS = st.one_of(
    st.dictionaries(NAMES, TENSORS | VALUES, max_size=3).map(written),
    JSON_BYTES,
    st.just(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[9],"data_offsets":[4,8]}}'
    ),
)
LENGTHS = st.none() | st.sampled_from([0, 1, 7, 8, 2**20, 2**31, 2**63, 2**64 - 1])


@QUICK
@given(header=HEADERS, length=LENGTHS, data=st.binary(max_size=64), is_adapter=st.booleans())
@example(
    header=b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    length=None,
    data=b"",
    is_adapter=False,
)
def test_a_safetensors_file(checkpoint: Path, header: bytes, length: int | None, data: bytes, is_adapter: bool) -> None:
    """Its header lies about offsets, lengths, shapes and itself."""
    content = struct.pack("<Q", len(header) if length is None else length) + header + data
    name = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    read = (lambda: read_tensor_headers(checkpoint, name)) if is_adapter else (lambda: inspect(checkpoint))
    ends_in_an_answer_or_a_sentence(checkpoint / name, content, read)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelRegistry, bytes]]:
    folder = tmp_path_factory.mktemp("hostile-store")
    registry = ModelRegistry(LocalObjectStore(folder / "store"))
    store_version(registry, folder / "built")
    yield registry, registry.objects.read_bytes("models/home/1/manifest.json")


FIELDS = st.sampled_from(
    (
        "name",
        "version",
        "created_at",
        "source",
        "builder",
        "variants",
        "files",
        "path",
        "sha256",
        "size_bytes",
        "digest",
    )
)


def altered(document: Any, path: list[int], value: object) -> Any:
    """Replace the value at a place of a document: at each level the key or index of that number."""
    if not path or not isinstance(document, dict | list) or not document:
        return value
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    document[keys[path[0] % len(keys)]] = altered(document[keys[path[0] % len(keys)]], path[1:], value)
    return document


@QUICK
@given(
    path=st.lists(st.integers(0, 20), max_size=6),
    value=VALUES | NUMBERS,
    raw=st.none() | JSON_BYTES,
    where=st.booleans(),
)
def test_a_manifest_or_a_record_in_a_store(
    manifest: tuple[ModelRegistry, bytes], path: list[int], value: object, raw: bytes | None, where: bool
) -> None:
    registry, whole = manifest
    evidence = next(entry.key for entry in registry.find("home@1").evidence_entries() if entry.key.endswith(".json"))
    key = "models/home/1/manifest.json" if where else evidence
    before = registry.objects.read_bytes(key)
    content = raw if raw is not None else written(altered(json.loads(before), path, value))
    try:
        registry.objects.put_bytes(key, content)
        version = registry.find("home@1")
        for fact in (version.deployed, version.serving, version.tags, version.says_origin):
            str(fact)
        list(registry.all_versions())
    except SlmopsError as error:
        assert "\n" not in error.message
    finally:
        registry.objects.put_bytes(key, before)
    with contextlib.suppress(ValueError):
        parse_foreign_manifest(content if where else whole)
