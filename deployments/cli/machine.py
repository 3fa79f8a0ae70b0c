"""The commands about this machine: its settings, its missing requirements, and Foundry Local's model folder."""

from typing import Annotated

import typer

from slmops.deployments.cli.options import Json
from slmops.deployments.cli.output import print_json, print_line, print_statements, print_table
from slmops.deployments.cli.running import load_settings


def config(as_json: Json = False) -> None:
    """Print every setting with its value and where it comes from."""
    from slmops.infra.settings import describe_settings

    rows = list(describe_settings(load_settings()))
    if as_json:
        settings = [
            {"variable": variable, "value": value, "source": source, "description": description}
            for variable, value, source, description in rows
        ]
        print_json({"settings": settings})
        return
    table = [
        {"setting": variable, "value": "-" if value is None else str(value), "source": source, "what": description}
        for variable, value, source, description in rows
    ]
    print_table("Settings", table)


def check(
    checkpoint: Annotated[str | None, typer.Argument(help="Checkpoint to check, with memory and disk for it.")] = None,
    source_build: Annotated[bool, typer.Option(help="Also check what building onnxruntime-genai needs.")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: Python, packages against the proven versions, Foundry's runtime, memory and disk.

    With a checkpoint, also its files, its prompts in the runtimes, and whether a model of its configuration is built
    exactly as in transformers.
    """
    from slmops.tasks.checkup import check_files
    from slmops.tasks.environment.checks import check_machine

    settings = load_settings()
    of_files, statements = check_files(settings, checkpoint)
    checks = [*check_machine(settings, checkpoint, source_build=source_build), *of_files]
    ok = all(check.ok for check in checks)
    if as_json:
        said = {"checkpoint": [statement.model_dump() for statement in statements]} if checkpoint else {}
        print_json({"ok": ok, "checks": [check.model_dump() for check in checks], **said})
    else:
        rows = [
            {
                "check": check.name,
                "needed": check.required,
                "found": check.found,
                "verdict": "ok" if check.ok else "failed",
                "what to do": check.what_to_do,
            }
            for check in checks
        ]
        print_table("Environment", rows)
        print_statements(statements)
    if not ok:
        raise typer.Exit(1)


def foundry_dir() -> None:
    """Print the directory for `foundry cache cd`."""
    print_line(str(load_settings().foundry_dir))
