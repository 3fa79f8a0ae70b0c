"""Runs on a server, followed at the terminal: `slmops deploy --remote` and `slmops logs`."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmops.deployments.cli import completion
from slmops.deployments.cli.output import print_line, sized
from slmops.deployments.cli.running import load_settings, the_registry, version_of
from slmops.deployments.cli.stages import StageDisplay, stage_display
from slmops.infra.errors import BadInput, SlmopsError

if TYPE_CHECKING:
    from slmops.deployments.server.remote_runs import FollowedRun, LogLine, RunState, TaskSeen

WAIT = "wait"  # the stage before a worker begins


def run_remotely(flow: str, parameters: Mapping[str, Any], files: tuple[str, ...], log_level: str | None) -> Any:
    """Run a flow's deployment on the server that is set or runs, show its stages, and return its document.

    `files` are the parameters that may name files of this machine. Raises `BadInput` without a server, and the run's
    own message, with its exit status, if it ended without a document.
    """
    from slmops.deployments.server.flow_runs import configured_reader
    from slmops.deployments.server.remote_runs import FollowedRun, readable_elsewhere, start_run

    reader = configured_reader()
    if reader is None:
        raise BadInput(
            "No Prefect server is set, and no slmops up runs with this home directory.",
            "Start it: slmops up",
            code="no-server",
        )
    with stage_display() as display:
        given = readable_elsewhere(parameters, files, reader, the_registry(), display)
        run = FollowedRun(reader, start_run(reader, flow, given, display.say))
        display.say(f"Run: {reader.address_of(run.run_id)}")
        with _goes_on(run):
            state = _show(run, display, logging.getLevelName(log_level.upper()) if log_level else None)
            document = run.document()
    if document is None:
        raise _error_of(state)
    return document


def logs(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME[@VERSION]|RUN]",
            help="Version; or with --follow a model, or a run's id or name. Default: the last run.",
            autocompletion=completion.references,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print the log of a run until it ends.")] = False,
) -> None:
    """Print the build logs of a version, or with --follow the log of a run until it ends."""
    if target and not follow:
        _build_logs(target)
        return
    from slmops.deployments.server.flow_runs import run_reader
    from slmops.deployments.server.remote_runs import FollowedRun

    with run_reader(load_settings()) as reader:
        if reader is None:
            raise BadInput("There are no runs yet.", "Start one: slmops deploy CHECKPOINT --name NAME", code="no-run")
        found = reader.find(target)
        print_line(f"{found.name}: {found.address or found.id}")
        run = FollowedRun(reader, found.id)
        with _goes_on(run):
            state = _print(run, follow=follow)
    print_line(f"{state.name}: {state.message}" if state.message else state.name)
    if follow and state.type != "COMPLETED":
        raise typer.Exit(_error_of(state).exit_code)


def _build_logs(reference: str) -> None:
    from slmops.infra.storage.evidence import BUILD

    for build in version_of(reference).all(BUILD):
        print_line(f"== {build.precision}: built in {build.wall_s:.1f} s, peak {sized(build.peak_rss_bytes)}")
        print_line(build.log.rstrip() or "(no output)")


def _print(run: "FollowedRun", *, follow: bool) -> "RunState":
    if not follow:
        for line in run.new_lines():
            print_line(_shown(line))
        return run.state()
    for look in run.looks(lines=True):
        for line in look.lines:
            print_line(_shown(line))
    return look.state


def _show(run: "FollowedRun", display: StageDisplay, level: int | None) -> "RunState":
    """Show a run's stages, and the lines of its log from a level on, until it has ended; returns its last state."""
    ended: set[str] = set()
    for look in run.looks(tasks=True, lines=level is not None):
        waits = look.state.type in ("SCHEDULED", "PENDING")
        display(WAIT, 0.0 if waits else 1.0, f"{look.state.name}: waits for a worker" if waits else "")
        for task in look.tasks:
            _show_stage(task, display, ended)
        for line in look.lines:
            if level is not None and line.level >= level:
                display.say(_shown(line))
    return look.state


def _show_stage(task: "TaskSeen", display: StageDisplay, ended: set[str]) -> None:
    if task.name in ended or task.state == "PENDING":
        return
    if task.state == "RUNNING":
        display(task.name, min(task.share, 0.99), "")
        return
    ended.add(task.name)
    display(task.name, 1.0, "done" if task.state == "COMPLETED" else "failed")


def _shown(line: "LogLine") -> str:
    at = datetime.fromisoformat(line.at).astimezone().strftime("%H:%M:%S")
    return f"{at} {logging.getLevelName(line.level):<7} {line.text}"


@contextmanager
def _goes_on(run: "FollowedRun") -> Iterator[None]:
    """Say, when the user stops to follow a run, that it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        where = run.reader.address_of(run.run_id)
        raise SlmopsError(
            "Interrupted; the run goes on.",
            f"Follow it: slmops logs -f {run.run_id}" + (f"; cancel it there: {where}" if where else ""),
            code="interrupted",
        ) from None


def _error_of(state: "RunState") -> SlmopsError:
    """Return the error of a run that ended without a document: its own message, else its state."""
    error = SlmopsError(state.message or f"The run ended as {state.name}.")
    error.exit_code = 3 if state.name == "Rejected" else 1
    return error
