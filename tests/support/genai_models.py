"""Real onnxruntime-genai folders for tests: built by Olive from tiny checkpoints, and damaged copies of them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.olive.calls import Build
from slmops.infra.process.supervisor import run_in_child
from tests.support.torch_process import TORCH_PROCESS

# A readable ONNX file without a node, where a test needs a model that nothing runs.
EMPTY_GRAPH = onnx.ModelProto(ir_version=10).SerializeToString()


def build_genai_model(checkpoint_dir: Path, directory: Path, precision: str = "fp32", **extra_options: Any) -> Path:
    """Build `checkpoint_dir` into `directory` through the project's own Olive engine and return it."""
    builder: dict[str, Any] = {"type": "ModelBuilder", "precision": precision}
    if extra_options:
        builder["extra_options"] = extra_options
    accelerators = [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]
    run_in_child(
        Build(
            olive_config={
                "input_model": {"type": "HfModel", "task": "text-generation"},
                "systems": {"local": {"type": "LocalSystem", "accelerators": accelerators}},
                "passes": {"builder": builder},
                "host": "local",
                "target": "local",
            },
            checkpoint_dir=checkpoint_dir,
            output_dir=directory,
            cache_dir=directory.with_name(directory.name + "-cache"),
            threads=2,
        ),
        deadline_s=300,
        log_path=directory.with_name(directory.name + ".log"),
        work_dir=directory.with_name(directory.name + "-work"),
        within=TORCH_PROCESS,
    )
    return directory


def logits_of(model_dir: Path, token_ids: Sequence[int], max_length: int | None = None) -> NDArray[np.float32]:
    """Return the logits [tokens, vocabulary] that onnxruntime-genai gives in one pass."""
    model = GenaiModel(model_dir, threads=2, all_positions=True)
    generator = model.start(max_length or len(token_ids) + 1)
    generator.append_tokens(np.asarray(token_ids, np.int32))
    return np.asarray(generator.get_output("logits")[0], np.float32)


def with_weights_set(model_dir: Path, directory: Path, name_part: str, value: float) -> Path:
    """Copy a float model to `directory` with every weight whose name contains `name_part` set to `value`."""
    shutil.copytree(model_dir, directory)
    model = onnx.load(directory / "model.onnx")
    changed = [tensor for tensor in model.graph.initializer if name_part in tensor.name]
    assert changed, f"no weight is called like {name_part}"
    for tensor in changed:
        array = np.full_like(numpy_helper.to_array(tensor), value)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    (directory / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, directory / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return directory


def with_a_slice(pruned_dir: Path) -> Path:
    """Let a model with `prune_lm_head` take the last position by a Slice, so that its graph cannot give all of them."""
    model = onnx.load(pruned_dir / "model.onnx", load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    gather, unsqueeze = nodes["/lm_head/prune/Gather"], nodes["/lm_head/prune/Unsqueeze"]
    bounds = {"start": -1, "end": 2**31, "axis": 1}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([value]), name) for name, value in bounds.items())
    last = onnx.helper.make_node("Slice", [gather.input[0], *bounds], unsqueeze.output)
    model.graph.node.insert(list(model.graph.node).index(gather), last)
    model.graph.node.remove(gather)
    model.graph.node.remove(unsqueeze)
    (pruned_dir / "model.onnx").write_bytes(model.SerializeToString())
    return pruned_dir
