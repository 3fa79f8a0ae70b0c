"""The commands that tell what is going on: the status of this home, the recent runs, and a version's report."""

import webbrowser
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmops.deployments.cli.next_step import next_step
from slmops.deployments.cli.options import Json, Reference
from slmops.deployments.cli.output import print_json, print_line, print_table, sized
from slmops.deployments.cli.running import load_settings, the_registry, version_of
from slmops.infra.errors import BadInput, SlmopsError
from slmops.infra.foreign_text import without_passwords

if TYPE_CHECKING:
    from pathlib import Path

    from slmops.deployments.server.flow_runs import DueRun, Run
    from slmops.infra.settings import Settings
    from slmops.infra.storage.model_summary import ModelSummary
    from slmops.infra.storage.version import Version

ASK_TIMEOUT_S = 2.0
# A page of the store may be a stranger's. This, before all that it says, keeps it from running or fetching anything.
ISOLATED = (
    '<!DOCTYPE html><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'\">\n"
)


def status(as_json: Json = False) -> None:
    """Show this home: models and champions, what is registered and served, runs under way, schedules, disk."""
    from slmops.infra.foundry.model_folder import registered_ids
    from slmops.infra.storage.disk import folder_size, free_space
    from slmops.infra.storage.model_summary import summarize_models

    settings = load_settings()
    models = summarize_models(the_registry())
    registered = registered_ids(settings.foundry_dir)
    servers, prefect = _servers(settings), _prefect()
    disk = {"home_bytes": folder_size(settings.home_dir), "free_bytes": free_space(settings.home_dir)}
    if as_json:
        print_json(
            {
                "home": str(settings.home_dir),
                "store": settings.store_uri,
                "models": [asdict(model) for model in models],
                "registered": registered,
                "servers": servers,
                "prefect": {**prefect, **{key: [run.model_dump() for run in prefect[key]] for key in ("runs", "due")}},
                "disk": disk,
            }
        )
        return
    print_line(f"Home: {settings.home_dir}")
    print_line(f"      {sized(disk['home_bytes'])}, {sized(disk['free_bytes'])} free on its disk")
    if settings.store.uri:
        print_line(f"Store: {settings.store_uri}")
    _show_models(models)
    _show_lines("Registered with Foundry Local", registered)
    _show_lines("Model servers", [_server_line(server) for server in servers])
    _show_prefect(prefect)
    print_line(f"\n{next_step()}")


def _servers(settings: "Settings") -> list[dict[str, Any]]:
    from slmops.infra.foundry.server_client import running_servers

    found: list[dict[str, Any]] = []
    try:
        for server in running_servers(settings.home_dir):
            found.append({"url": f"{server.url}/v1", "models": server.models(ASK_TIMEOUT_S)})
    except SlmopsError as error:
        found.append({"url": None, "fault": error.message})
    return found


def _server_line(server: dict[str, Any]) -> str:
    if fault := server.get("fault"):
        return str(fault)
    served = ", ".join(f"{name}@{number}" for name, number in server["models"].items())
    return f"{server['url']}: {served or 'no model yet'}"


def _prefect() -> dict[str, Any]:
    from slmops.deployments.server.flow_runs import configured_reader

    reader = configured_reader()
    urls = {"api_url": reader.url if reader else None, "ui_url": reader.ui if reader else None}
    found: dict[str, Any] = {name: url and without_passwords(url) for name, url in urls.items()}
    try:
        return {**found, "runs": reader.under_way() if reader else [], "due": reader.due() if reader else []}
    except SlmopsError as error:
        return {**found, "runs": [], "due": [], "fault": error.message}


def _show_models(models: Sequence["ModelSummary"]) -> None:
    rows = [
        {
            "model": model.name,
            "champion": f"@{model.champion}" if model.champion else "-",
            "candidate": f"@{model.candidate}" if model.candidate else "-",
            "newest": f"@{model.newest}",
            "serves": model.precision or "-",
            "size": "-" if model.size_bytes is None else sized(model.size_bytes),
            "TTFT ms": "-" if model.ttft_ms is None else f"{model.ttft_ms:,.0f}",
            "score": "-" if model.score is None else f"{model.score:.1%}",
            "deployed": when(model.deployed_at)[:10],
        }
        for model in models
        if not model.fault
    ]
    if rows:
        print_line("")
        print_table("Models", rows)
    for model in models:
        if model.fault:
            print_line(f"{model.name} cannot be read: {model.fault}")


def _show_lines(title: str, lines: Sequence[str]) -> None:
    if lines:
        print_line(f"\n{title}")
        for line in lines:
            print_line(f"  {line}")


def _show_prefect(prefect: dict[str, Any]) -> None:
    if prefect["api_url"] is None:
        print_line("\nPrefect: no server runs for this home; slmops up starts one.")
        return
    print_line(f"\nPrefect: {prefect['ui_url']}{', ' + prefect['fault'] if 'fault' in prefect else ''}")
    runs: list[Run] = prefect["runs"]
    due: list[DueRun] = prefect["due"]
    _show_lines("Runs under way", [line for run in runs for line in _run_lines(run)])
    planned = [f"{when(run.due_at)}  {run.deployment}{f' of {run.model}' if run.model else ''}" for run in due]
    _show_lines("Next by schedule", planned)


def runs(
    limit: Annotated[int, typer.Option(min=1, max=200, help="Number of runs.")] = 10, as_json: Json = False
) -> None:
    """List the last runs: state, name, start, duration, and where to see them."""
    from slmops.deployments.server.flow_runs import run_reader

    with run_reader(load_settings()) as reader:
        found = reader.recent(limit) if reader else []
    if as_json:
        print_json({"runs": [run.model_dump() for run in found]})
        return
    for run in found:
        for line in _run_lines(run):
            print_line(line)
    if not found:
        print_line("There are no runs yet. Start with: slmops deploy CHECKPOINT --name NAME")


def _run_lines(run: "Run") -> tuple[str, str]:
    took = "" if run.took_s is None else f"  {duration(run.took_s)}"
    return f"{run.state:<10} {when(run.started_at)}{took}  {run.name}", f"           {run.address or run.id}"


def when(moment: str | None) -> str:
    """Return a moment in ISO 8601 as a date and time of this machine's zone; a dash without one."""
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M") if moment else "-"


def duration(seconds: float) -> str:
    """Return a duration with its two largest units, such as `3 min 20 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def open_report(reference: Reference) -> None:
    """Open a version's report in the browser, and print its path."""
    version = version_of(reference)
    path = local_report(version, load_settings())
    print_line(str(path))
    webbrowser.open(path.as_uri())  # without a browser the path is enough


def local_report(version: "Version", settings: "Settings") -> "Path":
    """Return the path of a version's report as a page, which is fetched from the store if it is not under this home.

    Raises `BadInput` for a version without a report.
    """
    from slmops.infra.files import write_whole

    path = settings.home_dir / "reports" / f"{version.reference}.html"
    if path.is_file():
        return path
    page = version.report("report.html")
    if page is None:
        raise BadInput(
            f"{version.reference} has no report.",
            f"Judge it again, which writes one: slmops regate {version.reference}",
            code="report-missing",
        )
    write_whole(path, ISOLATED + page)
    return path
