"""`slmops retrain`: from a dataset to a version that takes the champion's place if it is better."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmops.deployments.cli.output import print_json, print_line
from slmops.deployments.cli.references import Json, load_settings

if TYPE_CHECKING:
    from slmops.infra.settings import Settings

RunFlow = Callable[[str, dict[str, Any], "Settings"], Any]
Prepare = Callable[["Settings", str | None], None]


def add_retrain_command(app: typer.Typer, prepare: Prepare, run_flow: RunFlow) -> None:
    """Add this command to the command line; `prepare` and `run_flow` set Prefect up and run a flow by its name."""

    @app.command()
    def retrain(
        dataset: Annotated[str, typer.Argument(help="Chats: JSONL file, s3:// object, or Hugging Face dataset.")],
        base: Annotated[str, typer.Option(help="Checkpoint to fine-tune: folder, Hub id, s3:// folder or store://.")],
        name: Annotated[str, typer.Option(help="Name of the model.")],
        eval_file: Annotated[str | None, typer.Option("--eval", help="Rows that both versions answer.")] = None,
        method: Annotated[str, typer.Option(help="lora or full.")] = "lora",
        epochs: Annotated[int, typer.Option(help="Passes over the dataset, at most.")] = 3,
        learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-4,
        batch_size: Annotated[int, typer.Option(help="Chats per step.")] = 8,
        lora_rank: Annotated[int, typer.Option(help="Rank of the adapter's matrices.")] = 16,
        patience: Annotated[int, typer.Option(help="Epochs without improvement before it stops.")] = 2,
        max_length: Annotated[int | None, typer.Option(help="Longest chat, in tokens.")] = None,
        seed: Annotated[int, typer.Option(help="Seed of all that is random.")] = 0,
        revision: Annotated[str | None, typer.Option(help="Revision of a base from the Hub.")] = None,
        precision: Annotated[list[str] | None, typer.Option(help="fp16, int8 or int4; repeatable.")] = None,
        no_promotion: Annotated[bool, typer.Option("--no-promotion", help="Never promote; only compare.")] = False,
        force: Annotated[bool, typer.Option("--force", help="Train although nothing has changed.")] = False,
        log_level: Annotated[str | None, typer.Option(help="Show the run's log.")] = None,
        as_json: Json = False,
    ) -> None:
        """Fine-tune a base, deploy the result as a candidate, and promote it if it is better than the champion."""
        settings = load_settings()
        parameters: dict[str, Any] = {
            **{"dataset": dataset, "base": base, "name": name, "evaluation_file": eval_file, "method": method},
            **{"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "lora_rank": lora_rank},
            **{"early_stopping_patience": patience, "max_length": max_length, "seed": seed, "revision": revision},
            **{"precisions": precision or None, "promotion": "never" if no_promotion else "if better", "force": force},
        }
        prepare(settings, log_level)
        from slmops.tasks.training.fine_tune import check_retrain

        check_retrain(parameters, settings)  # refuses bad input before anything is written
        report = run_flow("retrain", parameters, settings)
        if as_json:
            print_json(report.model_dump(mode="json"))
        else:
            print_line(report.summary)
        if report.status in ("rejected", "failed"):
            raise typer.Exit(3 if report.status == "rejected" else 1)
