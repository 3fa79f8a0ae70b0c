"""Run Olive, which turns a checkpoint into an onnxruntime-genai folder."""

import contextlib
import copy
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from slmops.infra.errors import StageFailed
from slmops.infra.olive.architectures import check_architecture
from slmops.infra.olive.calibration_data import calibrating_with
from slmops.infra.olive.calls import Build, Built
from slmops.infra.olive.lean_files import spare_reads_and_writes
from slmops.infra.olive.lean_import import import_olive_workflows
from slmops.infra.olive.options import read_olive_package_config
from slmops.infra.olive.step_progress import listening_to_steps
from slmops.infra.process.call import Progress

MODEL_BUILDER = "ModelBuilder"
# Olive's passes with an own class in slmops.
OWN_PASSES = {
    MODEL_BUILDER: "slmops.infra.olive.model_builder.ModelBuilder",
    "Gptq": "slmops.infra.olive.quantizing_passes.Gptq",
    "Rtn": "slmops.infra.olive.quantizing_passes.Rtn",
}

# Olive writes this file into the model's folder, with paths and times of this run.
OLIVE_RECORDS = frozenset({"model_config.json", "run_history.txt", "footprint.json", "output_footprint.json"})


class _LastFailure(logging.Handler):
    """Keeps the exception that Olive's engine only logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.exception: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.exception = record.exc_info[1]


def build(call: Build, progress: Progress) -> Built:
    """Build one variant with Olive.

    Raises `BadInput` for an architecture that is not supported, `StageFailed` if the build gives no model.
    """
    check_architecture(json.loads((call.checkpoint_dir / "config.json").read_text("utf-8")))
    os.environ["OMP_NUM_THREADS"] = str(call.threads)  # read once, when torch is imported below
    call.output_dir.mkdir(parents=True, exist_ok=True)
    if any(call.output_dir.iterdir()):
        raise StageFailed(
            f"The output folder {call.output_dir} is not empty.",
            "Give the build an empty folder.",
            code="output-folder-in-use",
        )
    call.cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="olive-", dir=call.cache_dir) as work:
        progress(0, 2, "building the model")
        with contextlib.ExitStack() as stack:
            stack.enter_context(listening_to_steps(progress))
            if call.calibration:
                stack.enter_context(calibrating_with(call.calibration))
            built = _run_olive(call.olive_config, call.checkpoint_dir, Path(work))
        progress(1, 2, "writing the model's folder")
        files = _move_model(built, call.output_dir)
    progress(2, 2, "built")
    return Built(files=tuple(files))


def _run_olive(olive_config: dict[str, Any], checkpoint_dir: Path, work: Path) -> Path:
    """Run Olive's engine and return the folder of the finished model."""
    workflows = import_olive_workflows()
    spare_reads_and_writes()
    package_config = read_olive_package_config()
    for name, path in OWN_PASSES.items():
        package_config["passes"][name] |= {"module_path": path}
    result_dir = work / "result"
    run_config = {
        **copy.deepcopy(olive_config),  # Olive modifies its argument
        "input_model": {**olive_config["input_model"], "model_path": str(checkpoint_dir)},
        "cache_dir": str(work / "cache"),
        "output_dir": str(result_dir),
        "no_artifacts": True,
        "evaluate_input_model": False,
    }
    temporary = work / "tmp"
    temporary.mkdir()
    failure = _LastFailure()
    logging.getLogger("olive").addHandler(failure)
    try:
        output = workflows.run(run_config, package_config=package_config, tempdir=str(temporary))
        reason = failure.exception
        produced = output is not None and output.has_output_model()
    except Exception as error:
        reason, produced = error, False
        logging.getLogger(__name__).exception("Olive failed")
    finally:
        logging.getLogger("olive").removeHandler(failure)
        tempfile.tempdir = None  # Olive leaves its own folder there, which is removed below
    if not produced:
        text = f"{type(reason).__name__}: {reason}" if reason else "it produced no model and gave no reason"
        raise StageFailed(
            f"Olive could not build the model: {' '.join(text.split())[:500]}",
            "The build's log has the details.",
            code="olive-failed",
        ) from reason
    return result_dir


def _move_model(built: Path, output_dir: Path) -> list[str]:
    genai_configs = list(built.rglob("genai_config.json"))
    if len(genai_configs) != 1:
        raise StageFailed(
            f"Olive's result has {len(genai_configs)} genai_config.json files; one was expected.",
            "Check the passes after ModelBuilder in the Olive configuration.",
        )
    for path in sorted(genai_configs[0].parent.iterdir()):
        if path.name not in OLIVE_RECORDS:
            shutil.move(path, output_dir / path.name)
    genai_config = json.loads((output_dir / "genai_config.json").read_text("utf-8"))
    model_file = genai_config["model"]["decoder"]["filename"]
    if not (output_dir / model_file).is_file():
        raise StageFailed(
            f"Olive's result lacks {model_file}, which its genai_config.json names.",
            "Check the passes after ModelBuilder in the Olive configuration.",
        )
    return sorted(path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if path.is_file())
