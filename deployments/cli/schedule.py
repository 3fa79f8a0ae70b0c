"""`slmops schedule`: retrain or measure a model by a cron, on the server that `slmops up` started or that is set."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from slmops.deployments.cli.options import Json, ModelName
from slmops.deployments.cli.output import print_json, print_line
from slmops.deployments.cli.running import load_settings
from slmops.infra.errors import BadInput

Cron = Annotated[str | None, typer.Option(help='When: five fields, such as "0 2 * * *".')]
Timezone = Annotated[str, typer.Option(help="Time zone of the cron, such as Europe/Berlin.")]
Dataset = Annotated[str | None, typer.Option(help="Chats to learn from, as slmops retrain takes them.")]
Base = Annotated[str | None, typer.Option(help="Checkpoint to fine-tune, as slmops retrain takes it.")]
Rows = Annotated[str | None, typer.Option("--eval", help="Rows that champion and candidate answer.")]
Approval = Annotated[bool, typer.Option("--approval", help="Ask a person before a better candidate is promoted.")]
Measure = Annotated[bool, typer.Option("--benchmark", help="Measure the champion again, in place of a retrain.")]
Remove = Annotated[bool, typer.Option("--remove", help="Remove the model's schedules.")]


def schedule(
    name: ModelName,
    cron: Cron = None,
    timezone: Timezone = "UTC",
    dataset: Dataset = None,
    base: Base = None,
    evaluation_file: Rows = None,
    approval: Approval = False,
    benchmark: Measure = False,
    remove: Remove = False,
    as_json: Json = False,
) -> None:
    """Retrain a model by a schedule, or with --benchmark measure it again."""
    from slmops.deployments.server.schedules import remove_schedules, set_schedule
    from slmops.infra.storage.names import check_name

    slugs = {kind: f"{kind}-{check_name(name)}" for kind in ("retrain", "benchmark")}
    if remove:
        require_server()
        gone = remove_schedules(slugs)
        print_line(f"Removed: {', '.join(gone)} of {name}." if gone else f"{name} has no schedule.")
        return
    if not cron:
        raise BadInput("No cron is given.", 'Write, for example, --cron "0 2 * * *".', code="cron-not-given")
    if benchmark:
        what, parameters = "benchmark", {"reference": name}
    else:
        what = "retrain"
        parameters = _retrain(name, dataset, base, {"evaluation_file": evaluation_file, "approval": approval})
    require_server()
    planned = set_schedule(what, slugs[what], cron, timezone, parameters)
    if as_json:
        print_json(planned.model_dump(mode="json"))
    else:
        print_line(f"{what} of {name}: {planned.rule}, next at {planned.next_at}.")


def _retrain(name: str, dataset: str | None, base: str | None, more: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a retrain, with whole paths; raises `BadInput` for what a retrain would refuse."""
    if not dataset or not base:
        raise BadInput(
            f"A retrain by schedule needs {'--base' if dataset else '--dataset' if base else '--dataset and --base'}.",
            "Name both, or schedule a measurement with --benchmark.",
            code="schedule-without-parameters",
        )
    from slmops.tasks.training.fine_tune import check_retrain

    given = {"name": name, "dataset": dataset, "base": base, **{key: value for key, value in more.items() if value}}
    parameters = {key: value if key == "name" else _whole(value) for key, value in given.items()}
    check_retrain(parameters, load_settings())
    return parameters


def _whole(value: Any) -> Any:
    """Return an existing file's or folder's whole path: runs do not start in this folder."""
    if isinstance(value, str) and (path := Path(value).expanduser()).exists():
        return str(path.absolute())
    return value


def require_server() -> None:
    """Raise `BadInput` if no Prefect server is set."""
    if not os.environ.get("PREFECT_API_URL"):
        raise BadInput(
            "No Prefect server is set, and no slmops up runs with this home directory.",
            "Start it: slmops up",
            code="no-server",
        )
