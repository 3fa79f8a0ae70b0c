"""`slmops retrain`: from a dataset to a version that takes the champion's place if it is better."""

from typing import Annotated, Any

import typer

from slmops.deployments.cli.approving import require_approver
from slmops.deployments.cli.options import Json, asks_for, known_level
from slmops.deployments.cli.output import print_json, print_line
from slmops.deployments.cli.running import end_with, load_settings, run_flow
from slmops.tasks.request.upkeep_parameters import RetrainParameters


@asks_for(RetrainParameters)
def retrain(
    parameters: dict[str, Any],
    log_level: Annotated[str | None, typer.Option(help="Show the run's log.", callback=known_level)] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a base, deploy the result as a candidate, and promote it if it is better than the champion."""
    from slmops.tasks.training.fine_tune import check_retrain

    check_retrain(parameters, load_settings())  # refuses bad input before anything is written
    require_approver(approval=bool(parameters.get("approval")))
    report = run_flow("retrain", parameters)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        print_line(report.summary)
    end_with(report.status)
