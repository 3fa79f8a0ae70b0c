"""The environment of commands: the settings, the store, Prefect's environment, and a flow in this process.

Imports are inside the functions that need them, which halves the time of `slmops --help`.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from slmops.deployments.cli.approving import answers_to
from slmops.deployments.cli.output import print_note
from slmops.deployments.cli.stages import StageDisplay, stage_display
from slmops.infra.errors import SlmopsError
from slmops.infra.process.garbage import importing

if TYPE_CHECKING:
    from slmops.infra.settings import Settings
    from slmops.infra.storage.registry import ModelRegistry
    from slmops.infra.storage.version import Version
    from slmops.tasks.runs.progress import StageListener

P = ParamSpec("P")


def load_settings() -> "Settings":
    """Return the settings, as `slmops.infra.settings.load_settings` reads them."""
    from slmops.infra import settings

    return settings.load_settings()


def the_registry() -> "ModelRegistry":
    """Return the registry in the store that the settings name."""
    from slmops.infra.storage.opening import open_registry

    return open_registry(load_settings())


def tell_interruptions() -> None:
    """Print a note for every change of a champion that a killed process left half done on this machine."""
    from slmops.infra.foundry.interruption import has_marks, interruptions

    try:
        settings = load_settings()
        found = list(interruptions(settings.home_dir, the_registry())) if has_marks(settings.home_dir) else []
    except (SlmopsError, OSError):  # the command itself reports it, if it matters to it
        return
    for sentence in found:
        print_note(f"note: {sentence}")


def version_of(reference: str) -> "Version":
    """Return the version that a reference names; raises `BadInput` when there is none."""
    return the_registry().find(reference)


def prepared(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command's body import `tasks` and `flows`: Prefect's environment is set before it runs."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from slmops.deployments.server.environment import prepare_prefect

        level = kwargs.get("log_level")
        prepare_prefect(load_settings(), log_level=level if isinstance(level, str) else None)
        command(*args, **kwargs)

    return run


def run_flow(
    name: str, parameters: Mapping[str, object], check: Callable[[], Mapping[str, float] | None] = lambda: None
) -> Any:
    """Run a flow in this process, show its stages, and return its report, also if the run ended as failed.

    `check` refuses bad input before anything is written, and may return the stages' planned times in s. Raises the
    error that ended the run.
    """
    with stage_display() as display:
        try:
            result = _run_in_process(name, parameters, check, display)
        except KeyboardInterrupt:
            kept = f"Done and kept: {', '.join(display.done[1:])}. " if display.done[1:] else ""
            advice = f"{kept}Run the command again: it continues after what is done."
            raise SlmopsError("Interrupted.", advice, code="interrupted") from None
    if isinstance(result, BaseException):
        from slmops.flows.endings import RunEnded

        if isinstance(result, RunEnded):
            return result.report
        raise result
    return result


def _run_in_process(
    name: str,
    parameters: Mapping[str, object],
    check: Callable[[], Mapping[str, float] | None],
    display: StageDisplay,
) -> Any:
    from slmops.deployments.server.environment import begin_embedded_server, prefect_api

    display("start", 0.0, "checking the request, starting Prefect")
    server = begin_embedded_server()  # its start takes as long as the imports and the check
    with importing():
        try:
            display.expect(check() or {})
        except BaseException:
            if server:
                server.end()
            raise
        from slmops.tasks.runs.progress import listening
        from slmops.tasks.runs.stage import final_state

        flow = getattr(import_module(f"slmops.flows.{name}"), name)
    with prefect_api(load_settings(), server), listening(_following(display)):
        display("start", 1.0, "")
        with answers_to(display) if parameters.get("approval") else nullcontext():
            return final_state(flow, **parameters).result(raise_on_failure=False)


def _following(display: StageDisplay) -> "StageListener":
    """Return a listener that shows stages and, before the first one, the run's address where there is a UI."""
    from slmops.deployments.server.flow_runs import configured_reader

    reader, said = configured_reader(), False

    def show(stage: str, share: float, what: str) -> None:
        nonlocal said
        if not said and reader:
            from prefect.runtime import flow_run

            if run_id := flow_run.get_id():
                display.say(f"Run: {reader.address_of(run_id)}")
                said = True
        display(stage, share, what)

    return show


def end_with(status: str) -> None:
    """End a command with the exit status of its run: 3 if nothing was approved of, 1 if something failed."""
    if status in ("rejected", "unapproved", "failed"):
        raise typer.Exit(1 if status == "failed" else 3)
