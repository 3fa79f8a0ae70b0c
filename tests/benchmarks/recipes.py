"""Measure what slmops' own recipes cost and give: size, speed, and distance from the checkpoint they are built from.

Run as `python -m tests.benchmarks.recipes [--precisions int4 int8] [--threads 2] [--rounds 5] [--untied]`; builds every
recipe of the precisions from one checkpoint of 48 M random parameters and measures them in turn, `--rounds` times, each
in a child process of its own. Prints a Markdown table with the best round of each recipe; takes about eight minutes on
two cores. Other work on the machine spoils the times, in the best round too. The weights are drawn at random: the
divergences rank the recipes against each other and say nothing of a trained model.
"""

import argparse
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slmops.infra.olive.calls import Build
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.settings import BenchmarkSettings, EvaluationSettings, MachineSettings, Settings
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.recipes import Recipe, known_recipes, load_recipe
from slmops.tasks.environment.host import builder_versions
from slmops.tasks.exams.answers import evaluate_variant, run_reference
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.exam import Bench
from slmops.tasks.exams.measurement import Measurement, measure_variant
from slmops.tasks.questions.evaluation_set import chat_prompts
from tests.support.checkpoints import make_tiny_checkpoint

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "head_dim": 64,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
}


EVALUATIONS = 3


def build(recipe: Recipe, checkpoint: Path, folder: Path, threads: int) -> float:
    """Build a recipe into `folder`/model; return the wall time in s."""
    child = run_in_child(
        Build(
            olive_config=olive_run_config(recipe),
            checkpoint_dir=checkpoint,
            output_dir=folder / "model",
            cache_dir=folder / "cache",
            threads=threads,
        ),
        deadline_s=1800,
        log_path=folder / "build.log",
        work_dir=folder / "work",
    )
    return child.wall_s


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
    parser.add_argument("--untied", action="store_true")
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
        checkpoint = make_tiny_checkpoint(work / "checkpoint", "qwen2", tied=not arguments.untied, **SHAPE)
        build_s = {recipe.name: build(recipe, checkpoint, work / recipe.name, arguments.threads) for recipe in recipes}
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
        print(f"{builder_versions()}; embedding {'apart' if arguments.untied else 'tied'}, {len(rows)} rows\n")
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
