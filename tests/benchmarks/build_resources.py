"""Measure what builds take: wall time, peak memory and size, on a 0.5 B Qwen2.5 shape with random weights.

Run as `python -m tests.benchmarks.build_resources [--tiny] [--precisions fp32 int8 ...]`; needs about 6 GB of memory
and 6 GB of disk. Prints one JSON line a build, with the error of the memory estimate that `slmops check` makes: 0.1 is
an estimate 10 % too high.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from slmops.infra.olive.calls import Build
from slmops.infra.settings import Settings
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.recipes import load_recipe
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.environment.estimates import estimate_build_ram
from slmops.tasks.request.parameters import PRECISIONS
from slmops.tasks.workshop import torch_process
from tests.support.checkpoints import make_tiny_checkpoint

QWEN2_5_0_5B: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "head_dim": 64,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
}


def measure(checkpoint: Path, precision: str, folder: Path) -> dict[str, Any]:
    """Build one variant in a child process and return its figures."""
    config = olive_run_config(load_recipe({"fp32": "fp16", "int4": "int4-rtn"}.get(precision, precision), "cpu"))
    config["passes"]["builder"]["precision"] = precision
    with torch_process(Settings(home=folder)) as child:
        result = child.run(
            Build(
                olive_config=config,
                checkpoint_dir=checkpoint,
                output_dir=folder / precision,
                cache_dir=folder / "cache",
                threads=2,
            ),
            deadline_s=1800,
            log_path=folder / f"{precision}.log",
            work_dir=folder / "work",
        )
    size_bytes = sum(path.stat().st_size for path in (folder / precision).iterdir())
    return {"wall_s": round(result.wall_s, 1), "peak_rss_bytes": result.peak_rss_bytes, "size_bytes": size_bytes}


def main() -> None:
    """Print the figures of each precision, and its size against fp32's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "int8", "int4"])
    parser.add_argument("--tiny", action="store_true", help="a tiny checkpoint in place of the 0.5 B shape")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    shape = {} if arguments.tiny else dict(QWEN2_5_0_5B)
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_tiny_checkpoint(folder / "checkpoint", "qwen2", tied=not arguments.untied, **shape)
        source_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        fp32_bytes = 2 * source_bytes
        print(json.dumps({"source_bytes": source_bytes, "tied": not arguments.untied, **shape}), flush=True)
        for precision in arguments.precisions:
            figures = measure(checkpoint, precision, folder)
            if precision == "fp32":
                fp32_bytes = figures["size_bytes"]
            figures["ratio_to_fp32"] = round(figures["size_bytes"] / fp32_bytes, 4)
            if precision in PRECISIONS:
                estimated = estimate_build_ram(inspect_checkpoint(checkpoint), precision)
                figures["estimated_rss_bytes"] = estimated
                figures["estimate_error"] = round(estimated / figures["peak_rss_bytes"] - 1, 3)
            print(json.dumps({"precision": precision, **figures}), flush=True)


if __name__ == "__main__":
    main()
