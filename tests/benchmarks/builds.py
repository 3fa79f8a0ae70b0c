"""Builds of recipes outside of a deploy, for the benchmarks: from a checkpoint and the texts to calibrate on."""

from pathlib import Path

from slmops.infra.olive.calls import Build
from slmops.infra.process.call import ChildResult
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.reference.answers import Question
from slmops.infra.settings import CalibrationSettings
from slmops.infra.transformers.calls import Calibrate, CalibrationTexts
from slmops.tasks.build.calibration import PROMPTS_AT_ONCE, built_in_prompts
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.recipes import Recipe
from tests.support.real_models import real_model

Texts = tuple[tuple[int, ...], ...]


def calibration_texts(checkpoint: Path, folder: Path, threads: int) -> Texts:
    """Return the texts that a deploy calibrates on without a file: the checkpoint's own answers."""
    return calibrate(checkpoint, folder, threads).value.rows


def calibrate(checkpoint: Path, folder: Path, threads: int) -> ChildResult[CalibrationTexts]:
    """Let a checkpoint answer the built-in prompts, in a child process."""
    sizes = CalibrationSettings()
    return run_in_child(
        Calibrate(
            checkpoint_dir=checkpoint,
            chats=(),
            prompts=tuple(
                Question(id=number, messages=tuple(turn.model_dump() for turn in prompt))
                for number, prompt in enumerate(built_in_prompts())
            ),
            max_tokens=sizes.max_tokens,
            max_new_tokens=sizes.max_new_tokens,
            batch_size=PROMPTS_AT_ONCE,
            threads=threads,
        ),
        deadline_s=1800,
        log_path=folder / "calibrate.log",
        work_dir=folder / "work",
    )


def build(recipe: Recipe, checkpoint: Path, folder: Path, threads: int, texts: Texts = ()) -> float:
    """Build a recipe into `folder`/model, calibrated on these texts if it is; return the wall time in s."""
    if recipe.is_calibrated and not texts:
        texts = calibration_texts(checkpoint, folder, threads)
    child = run_in_child(
        Build(
            olive_config=olive_run_config(recipe),
            checkpoint_dir=checkpoint,
            output_dir=folder / "model",
            cache_dir=folder / "cache",
            threads=threads,
            calibration=texts if recipe.is_calibrated else (),
        ),
        deadline_s=1800,
        log_path=folder / "build.log",
        work_dir=folder / "work",
    )
    return child.wall_s


def real_checkpoint(name: str) -> Path:
    """Return a folder, or the checkpoint of a name in `tests.support.real_models`."""
    return Path(name).absolute() if Path(name).is_dir() else real_model(name)
