"""The command line `slmops`: its commands, the environment that is set before they run, and the output of errors."""

import errno
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from slmops.deployments.cli import (
    benchmark,
    catalog,
    champion,
    demo,
    deploy,
    following,
    machine,
    retrain,
    schedule,
    serve,
    status,
    store,
    up,
    versions,
)
from slmops.deployments.cli.help_page import GroupedCommands, examples
from slmops.deployments.cli.next_step import next_step
from slmops.deployments.cli.output import print_error, print_line
from slmops.deployments.cli.running import load_settings, prepared, tell_interruptions
from slmops.infra.errors import BadInput, SlmopsError
from slmops.infra.files import write_whole
from slmops.infra.process.garbage import spare_imports

# Typer contains its own private copy of click: this is the base class of its usage errors.
UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

# By the panels of `slmops --help`, in its order.
PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Ship": {
        "deploy": deploy.deploy,
        "regate": deploy.regate,
        "promote": champion.promote,
        "rollback": champion.rollback,
        "retrain": retrain.retrain,
        "recipes": deploy.recipes,
        "demo": demo.demo,
        "make-demo": demo.make_demo,
    },
    "Look": {
        "status": status.status,
        "open": status.open_report,
        "runs": status.runs,
        "list": versions.list_models,
        "show": versions.show,
        "history": champion.history,
        "diff": versions.diff,
        "logs": following.logs,
        "benchmark": benchmark.benchmark,
        "sbom": versions.sbom,
    },
    "Serve": {
        "chat": versions.chat,
        "serve": serve.serve,
        "catalog": catalog.catalog,
        "foundry-dir": machine.foundry_dir,
        "unregister": versions.unregister,
    },
    "Store": {
        "push": store.push,
        "pull": store.pull,
        "ingest": store.ingest,
        "export": store.export_version,
        "import": store.import_version,
        "verify": store.verify,
        "sign": versions.sign,
        "alias": versions.alias,
        "tag": versions.tag,
        "note": versions.note,
        "delete": versions.delete,
        "gc": store.gc,
    },
    "Machine": {
        "check": machine.check,
        "config": machine.config,
        "up": up.up,
        "pool": up.pool,
        "schedule": schedule.schedule,
    },
}
# A full, faulty or read-only disk, permissions, a name that is too long: not a fault of slmops.
OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
)
# These read only the settings and the store. All others may import `tasks` and `flows`.
LIGHT = {
    "config", "list", "open", "show", "chat", "foundry-dir", "push", "verify", "ingest", "diff", "sign", "sbom",
    "alias", "tag", "note", "export", "import", "history",
}  # fmt: skip

app = typer.Typer(
    name="slmops",
    help="From a fine-tuned small language model to Foundry Local in one flow.",
    cls=GroupedCommands,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options of slmops itself."""
    if version:
        from importlib import metadata

        print_line(f"slmops {metadata.version('slmops')}")
    elif context.invoked_subcommand is None:
        print_line(context.get_help())
        print_line(f"\n{next_step()}")
    else:
        tell_interruptions()


for panel, commands in PANELS.items():
    for name, command in commands.items():
        registered = app.command(name, rich_help_panel=panel, epilog=examples(name))
        registered(command if name in LIGHT else prepared(command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command and end with its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    spare_imports()
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no such character shows its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(arguments))


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns 0 done, 1 failed, 2 bad usage or input, 3 every variant rejected."""
    try:
        status = app(args=list(arguments), prog_name="slmops", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        shown = _shown(error)
        print_error(shown, as_json="--json" in arguments)
        return shown.exit_code
    return status if isinstance(status, int) else 0


def _shown(error: BaseException) -> SlmopsError:
    """Return the error that the user sees after a command failed."""
    if isinstance(error, SlmopsError):
        return error
    if isinstance(error, UsageError):
        message = str(error.format_message())  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "slmops"
        return BadInput(message if message.endswith("?") else f"{message.rstrip('.')}.", f"See {where} --help.")
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return SlmopsError("Interrupted.", "Run the command again: it continues after the stages that are done.")
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        where = f"{error.filename}: " if error.filename else ""
        return SlmopsError(
            f"A file cannot be read or written: {where}{error.strerror}.",
            "Free or repair the disk, correct the permissions, or set SLMOPS_HOME to another folder.",
            code="disk-unusable",
        )
    from slmops.deployments.server.environment import lost_api

    return lost_api(error) or _unexpected(error)


def _unexpected(error: BaseException) -> SlmopsError:
    message = f"An unexpected error ended the run: {type(error).__name__}: {error}."
    try:
        log = load_settings().cache_dir / "logs" / "unexpected-error.log"
        write_whole(log, "".join(traceback.format_exception(error)))
    except (OSError, SlmopsError):  # the disk may be full
        return SlmopsError(message, "This is a fault of slmops or of its environment; no log could be written.")
    return SlmopsError(message, f"This is a fault of slmops or of its environment; the details are in {log}.")


if __name__ == "__main__":
    main()
