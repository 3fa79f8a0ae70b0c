"""The commands on the champion: promote a version, roll back, and see who held the name and why."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmops.deployments.cli.output import print_json, print_line, print_table
from slmops.deployments.cli.references import Json, Version, load_settings, the_registry
from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from slmops.infra.settings import Settings

RunFlow = Callable[[str, dict[str, Any], "Settings"], Any]
Prepare = Callable[["Settings", str | None], None]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]
LogLevel = Annotated[str | None, typer.Option(help="Show the run's log: debug, info, warning or error.")]


def add_promotion_commands(app: typer.Typer, prepare: Prepare, run_flow: RunFlow) -> None:
    """Add these commands to the command line; `prepare` and `run_flow` set Prefect up and run a flow by its name."""

    @app.command()
    def promote(reference: Version, reason: Reason = "", log_level: LogLevel = None, as_json: Json = False) -> None:
        """Make a version the champion, in the store, Foundry Local and running servers, or nowhere."""
        settings = load_settings()
        registry = the_registry()
        prepare(settings, log_level)
        from slmops.tasks.versions.change import plan_promotion

        plan_promotion(reference, reason, registry)  # refuses bad input before anything is written
        _show(run_flow("promote", {"reference": reference, "reason": reason}, settings), as_json=as_json)

    @app.command()
    def rollback(
        name: Name,
        to: Annotated[int | None, typer.Option(help="Version to go back to; default: the champion before.")] = None,
        reason: Reason = "",
        log_level: LogLevel = None,
        as_json: Json = False,
    ) -> None:
        """Go back to the champion before the present one, in the way of any promotion."""
        settings = load_settings()
        registry = the_registry()
        prepare(settings, log_level)
        from slmops.tasks.versions.change import plan_rollback

        plan_rollback(name, to, reason, registry)
        _show(run_flow("rollback", {"name": name, "to": to, "reason": reason}, settings), as_json=as_json)

    app.command()(history)


def _show(promotion: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(promotion.model_dump(mode="json"))
        return
    print_line(promotion.summary)
    if promotion.proof:
        proof = promotion.proof
        print_line(f"Foundry Local answered {proof.question!r} through {proof.model_id}: {proof.answer}")


def history(name: Name, as_json: Json = False) -> None:
    """Tell who was the champion of a name, since when, by whom and why, the present one first."""
    from dataclasses import asdict

    from slmops.infra.storage.manifest import check_name
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
        print_line(f"No change of {name}'s champion is on record.")
