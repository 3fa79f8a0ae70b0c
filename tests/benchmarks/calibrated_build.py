"""Measure the time and memory of a calibrated build.

Run as `python -m tests.benchmarks.calibrated_build [--shape qwen2.5-0.5b] [--layers N] [--recipe int4] [--threads 2]
[--work FOLDER]`. The weights are random, which changes neither the time nor the memory. Prints for each step, the
calibration's texts and the build, its wall time and CPU time in s and its peak memory in MB. `--layers` cuts the shape,
to find what a layer adds; `--work` keeps the checkpoint and the texts, so that the next run only builds.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slmops.infra.olive.calls import Build
from slmops.infra.process.supervisor import run_in_child
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.recipes import load_recipe
from tests.benchmarks.builds import calibrate
from tests.benchmarks.random_checkpoint import SHAPES, write_random_checkpoint


@contextmanager
def cpu_time(step: str) -> Iterator[None]:
    """Print the wall time and the CPU time of a step's child processes, in s."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{step}: {time.monotonic() - start:.0f} s, {cpu:.0f} CPU-s", end="", flush=True)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        work = (asked.work or Path(aside)).absolute()
        checkpoint, texts_file = work / "checkpoint", work / "texts.json"
        work.mkdir(parents=True, exist_ok=True)
        if not (checkpoint / "config.json").exists():
            shape = SHAPES[asked.shape] | ({"num_hidden_layers": asked.layers} if asked.layers else {})
            write_random_checkpoint(checkpoint, shape)
        if not texts_file.exists():
            with cpu_time("calibration"):
                made = calibrate(checkpoint, work, asked.threads)
            print(f", peak {made.peak_rss_bytes / 1e6:.0f} MB", flush=True)
            texts_file.write_text(json.dumps(made.value.rows), "utf-8")
        texts = tuple(tuple(row) for row in json.loads(texts_file.read_bytes()))
        print(f"{sum(map(len, texts))} tokens in {len(texts)} texts", flush=True)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            call = Build(
                olive_config=olive_run_config(load_recipe(asked.recipe)),
                checkpoint_dir=checkpoint,
                output_dir=Path(folder) / "model",
                cache_dir=Path(folder) / "cache",
                threads=asked.threads,
                calibration=texts,
            )
            with cpu_time("build"):
                built = run_in_child(call, deadline_s=3600, log_path=work / "build.log", work_dir=work / "process")
            print(f", peak {built.peak_rss_bytes / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
