"""The recorded command line: every command, its options with types and defaults, and its help.

After an intended change, `python -m tests.deployments.cli.test_command_line` records the new form.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from slmops.deployments.cli.app import app

GROUP: Any = typer.main.get_command(app)
CONTEXT: Any = GROUP.context_class(GROUP, info_name="slmops", terminal_width=100, **GROUP.context_settings)
RECORDED = Path(__file__).parent / "golden" / "command_line.json"


def described(option: Any) -> dict[str, Any]:
    """Return what a user can see of an option or an argument."""
    kept = ("required", "nargs", "default", "help", "metavar", "multiple", "is_flag", "min", "max")
    found = {key: getattr(option, key, None) for key in kept}
    is_option = hasattr(option, "is_flag")
    return {
        "kind": "option" if is_option else "argument",
        "names": sorted(option.opts) if is_option else [(option.metavar or option.name).upper()],
        "type": str(option.type_descriptor.annotation),
        **found,
    }


def command_line() -> dict[str, Any]:
    """Return every command with its help and options, in the order that `slmops --help` lists them."""
    return {"slmops": GROUP.get_help(CONTEXT).splitlines(), "commands": {name: form(name) for name in GROUP.commands}}


def form(name: str) -> dict[str, Any]:
    command = GROUP.commands[name]
    context = GROUP.context_class(command, info_name=name, parent=CONTEXT, terminal_width=100)
    return {
        "help": command.get_help(context).splitlines(),
        "options": [described(option) for option in command.params],
    }


RECORD = json.loads(RECORDED.read_text("utf-8")) if RECORDED.is_file() else {"commands": {}}


def test_the_commands_are_listed_in_the_recorded_order() -> None:
    found = command_line()
    assert found["slmops"] == RECORD["slmops"]
    assert list(found["commands"]) == list(RECORD["commands"])


@pytest.mark.parametrize("command", RECORD["commands"])
def test_a_command_has_the_recorded_options_and_help(command: str) -> None:
    assert json.loads(json.dumps(form(command))) == RECORD["commands"][command]


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(command_line(), indent=1) + "\n", "utf-8")
