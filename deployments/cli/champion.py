"""The commands for the champion: promote a version, roll back, and print the history."""

from typing import TYPE_CHECKING, Annotated

import typer

from slmops.deployments.cli.approving import require_approver
from slmops.deployments.cli.options import Json, LogLevel, ModelName, Reason, VersionReference
from slmops.deployments.cli.output import print_answer, print_json, print_line, print_table
from slmops.deployments.cli.running import run_flow, the_registry
from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from slmops.tasks.versions.promotion import Promotion


def promote(
    reference: VersionReference,
    reason: Reason = "",
    approval: Annotated[
        bool, typer.Option("--approval", help="Ask a person first: in Prefect's UI, or here if no server is set.")
    ] = False,
    log_level: LogLevel = None,
    as_json: Json = False,
) -> None:
    """Make a version the champion in the store, Foundry Local and running servers: in all of them or in none."""
    from slmops.tasks.versions.change import plan_promotion

    plan_promotion(reference, reason, the_registry())  # refuses bad input before anything is written
    require_approver(approval=approval)
    parameters = {"reference": reference, "reason": reason, "approval": approval}
    _show(run_flow("promote", parameters), as_json=as_json)


def rollback(
    name: ModelName,
    to: Annotated[int | None, typer.Option(help="Version to go back to; default: the previous champion.")] = None,
    reason: Reason = "",
    log_level: LogLevel = None,
    as_json: Json = False,
) -> None:
    """Make the previous champion the champion again, by the same steps as a promotion."""
    from slmops.tasks.versions.change import plan_rollback

    plan_rollback(name, to, reason, the_registry())  # refuses bad input before anything is written
    _show(run_flow("rollback", {"name": name, "to": to, "reason": reason}), as_json=as_json)


def _show(promotion: "Promotion", *, as_json: bool) -> None:
    if as_json:
        print_json(promotion.model_dump(mode="json"))
        return
    print_line(promotion.summary)
    if promotion.proof:
        print_answer(promotion.proof.question, promotion.proof.model_id, promotion.proof.answer)


def history(name: ModelName, as_json: Json = False) -> None:
    """List the champions of a name, newest first: since when, set by whom, and why."""
    from dataclasses import asdict

    from slmops.infra.storage.names import check_name
    from slmops.infra.storage.registry import CHAMPION

    registry = the_registry()
    changes = registry.champion_history(check_name(name))
    if not changes and name not in registry.names():
        raise BadInput(f"The store has no {name}.", f"It has: {', '.join(registry.names()) or 'nothing yet'}.")
    if as_json:
        champion = registry.alias(name, CHAMPION)
        print_json({"name": name, "champion": champion, "history": [asdict(change) for change in changes]})
        return
    rows = [
        {
            "champion": f"{name}@{change.version}" if change.version else "none",
            "since": change.since[:19],
            "before": f"{name}@{change.former}" if change.former else "-",
            "by": change.by,
            "how": "rolled back" if change.rolled_back else "promoted" if change.version else "removed",
            "reason": change.reason,
        }
        for change in changes
    ]
    print_table(f"Champions of {name}", rows)
    if not rows:
        print_line(f"No change of {name}'s champion is recorded.")
