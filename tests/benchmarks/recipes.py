"""Measure slmops' own recipes: size, speed, and distance from the source checkpoint.

Run as `python -m tests.benchmarks.recipes [--model smollm2-off-grid] [--precisions int4 int8] [--threads 2]
[--rounds 5]`; builds every recipe of the precisions from a checkpoint with trained weights and measures them in turn,
`--rounds` times, each in a child process of its own. The default is SmolLM2-135M-Instruct with its weights off the grid
of the GGUF that they come from; `--model gemma3-270m` or a folder names another one. Prints a Markdown table with the
best round of each recipe; takes about half an hour on two cores. Other work on the machine spoils the times, in the
best round too.
"""

import argparse
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from slmops.infra.olive.calls import Build
from slmops.infra.process.call import ChildResult
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.reference.answers import Question
from slmops.infra.settings import (
    BenchmarkSettings,
    CalibrationSettings,
    EvaluationSettings,
    MachineSettings,
    Settings,
)
from slmops.infra.transformers.calls import Calibrate, CalibrationTexts
from slmops.tasks.build.calibration import PROMPTS_AT_ONCE, built_in_prompts
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.recipes import Recipe, known_recipes, load_recipe
from slmops.tasks.environment.host import builder_versions
from slmops.tasks.exams.answers import evaluate_variant, run_reference
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.exam import Bench
from slmops.tasks.exams.measurement import Measurement, measure_variant
from slmops.tasks.questions.evaluation_set import chat_prompts
from tests.support.real_models import real_model

EVALUATIONS = 3
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


def row_of(
    recipe: Recipe, build_s: float, rounds: list[Measurement], evaluations: list[Evaluation], folder: Path
) -> str:
    """Return a recipe's line of the table."""
    metrics = [measured.metrics for measured in rounds]
    rates = [metric["token_generation_throughput_tps"] for metric in metrics]
    size_bytes = (folder / "model" / "model.onnx.data").stat().st_size
    wall_s = min(evaluation.wall_s for evaluation in evaluations)
    evaluated = evaluations[0]  # the figures are the same each time
    return (
        f"| `{recipe.name}` | {build_s:.0f} | {size_bytes / 1e6:.1f} "
        f"| {min(metric['peak_rss_bytes'] for metric in metrics) / 1e6:.0f} "
        f"| {min(metric['ttft_ms'] for metric in metrics):.0f} "
        f"| {max(metric['prompt_processing_throughput_tps'] for metric in metrics):.0f} | {max(rates):.0f} "
        f"| {statistics.median(rates):.0f} | {evaluated.kl_divergence:.3f} | {evaluated.top1_agreement:.3f} "
        f"| {wall_s:.1f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precisions", nargs="+", default=["int4", "int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2-off-grid", help="a name of tests.support.real_models, or a folder")
    arguments = parser.parse_args()
    recipes = [load_recipe(name) for precision in arguments.precisions for name in known_recipes(precision)]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        settings = Settings(
            home=work / "home",
            machine=MachineSettings(threads=arguments.threads),
            benchmark=BenchmarkSettings(prompt_tokens=(128,), new_tokens=64, repetitions=3),
            evaluation=EvaluationSettings(max_new_tokens=32, max_positions=512),
        )
        checkpoint = real_checkpoint(arguments.model)
        texts = calibration_texts(checkpoint, work, arguments.threads)
        build_s = {
            recipe.name: build(recipe, checkpoint, work / recipe.name, arguments.threads, texts) for recipe in recipes
        }
        rounds: dict[str, list[Measurement]] = {recipe.name: [] for recipe in recipes}
        for _ in range(arguments.rounds):
            for recipe in recipes:
                folder = work / recipe.name
                rounds[recipe.name].append(measure_variant(settings, Bench(folder / "model", folder / "measure")))
        rows = chat_prompts()
        run_reference(settings, Bench(checkpoint, work / "reference"), rows)
        evaluations: dict[str, list[Evaluation]] = {recipe.name: [] for recipe in recipes}
        for _ in range(EVALUATIONS):
            for recipe in recipes:
                folder = work / recipe.name
                bench = Bench(folder / "model", folder / "evaluate")
                evaluations[recipe.name].append(
                    evaluate_variant(settings, bench, rows, reference_dir=work / "reference")
                )
        first = rounds[recipes[0].name][0]
        print(f"{datetime.now(UTC):%Y-%m-%d}; {first.hardware.cpu}, {arguments.threads} threads; {first.versions}")
        print(f"{builder_versions()}; {arguments.model}, {len(rows)} rows\n")
        print(
            "| recipe | build s | size MB | peak RSS MB | TTFT ms | prompt tok/s | new tok/s, best | median "
            "| KL, nats | top-1 | evaluation s |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for recipe in recipes:
            print(
                row_of(recipe, build_s[recipe.name], rounds[recipe.name], evaluations[recipe.name], work / recipe.name)
            )


if __name__ == "__main__":
    main()
