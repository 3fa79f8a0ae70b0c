"""Real onnxruntime-genai folders for tests: built by Olive from tiny checkpoints, and damaged copies of them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

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
