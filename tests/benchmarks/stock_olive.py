"""Stock Olive's builds of the same three variants, by its ModelBuilder with its onnxruntime-genai 0.14.1.

That version of the builder is kept in `slmops-bench/` of the user's cache folder, where only these commands see it. The
rest is what this environment has, Olive itself above all. A run takes four minutes and 11 GB of memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmops.infra.process.channel import QUIET_ENVIRONMENT
from tests.benchmarks.llama_cpp import cache_folder
from tests.benchmarks.watching import Watched, run_watched

BUILDER = "onnxruntime-genai==0.14.1"
# There is no fp16 and no int8 in its builder for CPUs: both are passes over fp32, which Olive builds once and caches.
PASSES: dict[str, dict[str, Any]] = {
    "int4": {"builder": {"type": "ModelBuilder", "precision": "int4"}},
    "fp16": {
        "builder": {"type": "ModelBuilder", "precision": "fp32"},
        "half": {"type": "OnnxFloatToFloat16", "save_as_external_data": True},
    },
    "int8": {
        "builder": {"type": "ModelBuilder", "precision": "fp32"},
        "quantize": {"type": "OnnxDynamicQuantization", "save_as_external_data": True},
    },
}


def build_by_stock_olive(checkpoint: Path, folder: Path, say: Callable[[str], None]) -> dict[str, Watched]:
    """Build all variants of a checkpoint, a command each, as its user does; returns what each took.

    Raises `RuntimeError` where the builder's version cannot be installed or Olive makes no model.
    """
    packages = _packages()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        **QUIET_ENVIRONMENT,  # without it each command waits for an upload; it is the faster for it
        "PYTHONPATH": str(packages),
        "HF_HUB_CACHE": str(folder / "hub"),  # the builder lays its temporary files there
    }
    taken: dict[str, Watched] = {}
    for precision, passes in PASSES.items():
        say(f"stock Olive: {precision}")
        config = folder / f"{precision}.json"
        output = folder / precision
        config.write_text(json.dumps(_config(checkpoint, passes, folder / "cache", output)), "utf-8")
        command: list[str | Path] = [sys.executable, "-m", "olive", "run", "--config", config]
        taken[precision] = run_watched(command, log=folder / f"{precision}.log", cwd=folder, environment=environment)
        if not list(output.rglob("*.onnx")):
            raise RuntimeError(f"Stock Olive made no {precision}: {taken[precision].output[-2000:]}")
    return taken


def _config(checkpoint: Path, passes: dict[str, Any], cache: Path, output: Path) -> dict[str, Any]:
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    return {
        "input_model": {"type": "HfModel", "model_path": str(checkpoint), "task": "text-generation"},
        "systems": {"local_system": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "host": "local_system",
        "target": "local_system",
        "passes": passes,
        "cache_dir": str(cache),
        "output_dir": str(output),
    }


def _packages() -> Path:
    folder = cache_folder().with_name(BUILDER.replace("==", "-"))
    if not (folder / "onnxruntime_genai").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), BUILDER]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{BUILDER} could not be installed: {done.stderr[-2000:]}")
    return folder
