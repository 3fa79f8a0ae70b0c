"""Weights quantized one by one, while they are written, equal those of the unpatched builder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.infra.olive import streamed_quantization
from slmops.infra.olive.engine import build
from slmops.infra.process.channel import QUIET_ENVIRONMENT
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.olive_builds import build_request

pytestmark = pytest.mark.runtime

# Those of tests/infra/olive/test_engine.py whose answers are compared with transformers'.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3")
OPTIONS: dict[str, dict[str, Any]] = {
    "int4": {"precision": "int4"},
    "int8": {"precision": "int8"},
    "int4 asymmetric": {"precision": "int4", "is_symmetric": False},
    "int8 asymmetric in blocks that do not divide": {"precision": "int8", "is_symmetric": False, "block_size": 128},
    "int4 for another target": {"precision": "int4", "execution_provider": "webgpu"},
}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (QUIET_ENVIRONMENT | {"OMP_NUM_THREADS": "2"}).items():
            patch.setenv(name, value)
        yield


def built(checkpoint: Path, output: Path, options: dict[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Build, and return the graph's nodes with all attributes, and the initializers."""
    import onnx_ir as ir

    build(build_request(checkpoint, output, **options), lambda done, total, what: None)
    model = ir.load(output / "model.onnx")
    nodes = [str(ir.to_proto(node)) for node in model.graph]
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    assert (model.ir_version, model.opset_imports["com.microsoft"]) >= (10, 1)
    return sorted(nodes), arrays


def watched(patch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that shows, after a build, whether it was streamed."""
    can_stream, answers = streamed_quantization._can_stream, []

    def watch(model: Any) -> bool:
        answers.append(can_stream(model))
        return answers[-1]

    patch.setattr(streamed_quantization, "_can_stream", watch)
    return answers


def is_the_same(array: np.ndarray, other: np.ndarray) -> bool:
    described = (array.dtype, array.shape) == (other.dtype, other.shape)
    return described and array.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("family", "asked", "tied"),
    [
        *((family, asked, False) for family in FAMILIES for asked in ("int4", "int8", "int4 asymmetric")),
        *(("qwen2", asked, tied) for asked in list(OPTIONS)[3:] for tied in (True, False)),
        *(("llama", asked, True) for asked in list(OPTIONS)[:3]),
    ],
)
def test_the_result_is_the_builders_own_to_the_bit(
    family: str, asked: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", family, tied=tied)
    answers = watched(monkeypatch)
    nodes, arrays = built(checkpoint, tmp_path / "streamed", OPTIONS[asked])
    assert answers == [True]
    monkeypatch.setattr(streamed_quantization, "_can_stream", lambda model: False)
    plain_nodes, plain_arrays = built(checkpoint, tmp_path / "plain", OPTIONS[asked])
    assert nodes == plain_nodes
    assert any("MatMulNBits" in node for node in nodes)
    assert arrays.keys() == plain_arrays.keys()
    assert [name for name, array in arrays.items() if not is_the_same(array, plain_arrays[name])] == []


@pytest.mark.parametrize(
    "options",
    [
        {"algo_config": "k_quant"},
        {"use_qdq": True},
        {"extra_options": {"matmul_mixed_precision": {"last_matmul": "int8"}}},
        {"op_types_to_quantize": ["MatMul", "Gather"], "extra_options": {"shared_embeddings": False}},
    ],
)
def test_what_is_special_is_left_to_the_builder(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = watched(monkeypatch)
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "qwen2")
    built(checkpoint, tmp_path / "built", {"precision": "int4", **options})
    assert answers == [False]
