"""The commands on the demos: small models that turn smart-home commands into JSON actions, or into calls of tools."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slmops.deployments.cli.deploy import deploy_checkpoint
from slmops.deployments.cli.options import Json, LogLevel
from slmops.deployments.cli.output import print_json, print_line
from slmops.deployments.cli.running import load_settings
from slmops.deployments.cli.stages import stage_display

if TYPE_CHECKING:
    from slmops.tasks.training.demo import DemoCheckpoint

DEMO_NAME = "home"
TOOL_DEMO_NAME = "home-tools"
DEMO_SEED = 0

Seed = Annotated[int, typer.Option(help="Seed of the data and of the training.")]

Tools = Annotated[bool, typer.Option("--tools", help="Make the demo whose model calls functions (`home-tools`).")]


def make_demo(
    directory: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    tools: Tools = False,
    seed: Seed = DEMO_SEED,
    as_json: Json = False,
) -> None:
    """Train a small chat model that turns smart-home commands into JSON actions."""
    made = _make(directory, seed, tools=tools)
    if as_json:
        print_json({"checkpoint": str(directory), "parameters": made.parameters, "exact_match": made.exact_match})
        return
    print_line(f"{directory}: {made.parameters:,} parameters, {made.exact_match:.1%} of held-out commands exact.")


def demo(tools: Tools = False, seed: Seed = DEMO_SEED, log_level: LogLevel = None, as_json: Json = False) -> None:
    """Make the demo checkpoint, deploy it as `home`, and ask it to turn on a light."""
    checkpoint = load_settings().home_dir / ("tool-demo" if tools else "demo")
    _make(checkpoint, seed, tools=tools, replace=True)
    name = TOOL_DEMO_NAME if tools else DEMO_NAME
    deploy_checkpoint({"checkpoint": str(checkpoint), "name": name}, as_json=as_json)


def _make(directory: Path, seed: int, *, tools: bool, replace: bool = False) -> "DemoCheckpoint":
    with stage_display() as display:
        display("train", 0.0, "making the rows")
        from slmops.tasks.training.demo import make_demo_checkpoint

        return make_demo_checkpoint(
            load_settings(),
            directory,
            seed,
            lambda done, total, what: display("train", done / total, what),
            tools=tools,
            replace=replace,
        )
