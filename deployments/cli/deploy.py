"""The commands that build and judge: deploy a checkpoint, judge a version again, and list the recipes."""

import threading
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmops.deployments.cli.following import run_remotely
from slmops.deployments.cli.options import Json, LogLevel, asks_for
from slmops.deployments.cli.output import (
    print_answer,
    print_json,
    print_line,
    print_note,
    print_plots,
    print_prose,
    print_statements,
    print_table,
)
from slmops.deployments.cli.running import end_with, load_settings, run_flow, version_of
from slmops.infra.errors import BadInput
from slmops.tasks.request.parameters import PRECISIONS, DeployParameters, RegateParameters

if TYPE_CHECKING:
    from slmops.tasks.plan import DeployPlan
    from slmops.tasks.report.records import DeployReport
    from slmops.tasks.versions.receipts import Receipt


@asks_for(DeployParameters)
def deploy(
    parameters: dict[str, object],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and exit.")] = False,
    remote: Annotated[
        bool, typer.Option("--remote", help="Run it on a worker of the Prefect server, and follow it here.")
    ] = False,
    log_level: LogLevel = None,
    as_json: Json = False,
) -> None:
    """Build, store, measure, judge, register and prove a checkpoint."""
    if remote and dry_run:
        raise BadInput("--remote starts a run, and --dry-run does not.", "Leave one of them out.")
    if remote:
        _deploy_remotely(parameters, log_level, as_json=as_json)
        return
    if not dry_run:
        deploy_checkpoint(parameters, as_json=as_json)
        return
    from slmops.tasks.plan import plan_deploy

    plan = plan_deploy(load_settings(), parameters)
    if as_json:
        print_json(plan.model_dump(mode="json"))
    else:
        _show_plan(plan)


@asks_for(RegateParameters)
def regate(parameters: dict[str, Any], log_level: LogLevel = None, as_json: Json = False) -> None:
    """Judge a version again, without building it, and register or unregister its variants accordingly."""
    version_of(parameters["reference"])  # refuses a missing version before anything is written
    _print_result(run_flow("regate", parameters), as_json=as_json)


def recipes(as_json: Json = False) -> None:
    """List the recipes that --recipe takes, and that --search tries."""
    from slmops.tasks.build.olive_config import OLIVE_PROVIDERS
    from slmops.tasks.build.recipes import known_recipes, load_recipe

    found = [
        {
            "recipe": name,
            "precision": precision,
            "execution_provider": provider,
            "remarks": " ".join(load_recipe(name, provider).warnings),
        }
        for provider in OLIVE_PROVIDERS
        for precision in PRECISIONS
        for name in known_recipes(precision, provider)
    ]
    if as_json:
        print_json({"recipes": found})
    else:
        print_table("Recipes", found)


def deploy_checkpoint(parameters: dict[str, object], *, as_json: bool) -> None:
    """Run the flow `deploy`, print its report, and end with its exit status.

    If nothing changed since a deploy that ended well, no run is made, and its report is printed.
    """
    from slmops.tasks.versions.receipts import Receipts

    receipts = Receipts.of(load_settings(), parameters)
    if known := receipts.known():
        _print_known(known, as_json=as_json)
        return

    def check() -> dict[str, float]:
        from slmops.tasks.plan import plan_deploy

        # The plan waits for a child process that renders the chat template.
        threading.Thread(target=import_module, args=("slmops.flows.deploy",)).start()
        return _by_stage(plan_deploy(load_settings(), parameters))

    report = run_flow("deploy", parameters, check)
    from slmops.tasks.report.markdown import variant_rows

    receipts.keep(report, variant_rows(report))
    _print_result(report, as_json=as_json)


def _by_stage(plan: "DeployPlan") -> dict[str, float]:
    """Return a plan's times in s by the names of the run's stages; of stages side by side, under the later one's."""
    times: dict[str, float] = {}
    for estimate in plan.stages:
        work, _, precision = estimate.stage.rpartition(" ")
        stage = f"prove {precision}" if work == "register and prove" else estimate.stage
        times[stage.replace(" in genai and foundry", " in foundry")] = estimate.time_s
    return times


def _print_known(known: "Receipt", *, as_json: bool) -> None:
    report: dict[str, Any] = known.report
    print_note(f"Nothing changed since {known.at}, so no run was made.")
    if as_json:
        print_json(report)
        return
    print_table(f"{report['name']}@{report['version']} (unchanged)", known.rows)
    print_line("")
    print_line(known.summary)
    if report["reason"]:
        print_line(f"Selected: {report['selected'] or 'none'}. {report['reason']}")
    for text in [*report["warnings"], *(text for variant in report["variants"] for text in variant["warnings"])]:
        print_line(f"warning: {text}")
    for variant in report["variants"][-1:]:
        print_answer(report["question"], variant["foundry_model_id"], variant["answer"])
    print_line(f"Talk to it: slmops chat {report['name']}@{report['version']}")
    print_line(f"Report: {report['html_file']}")


def _deploy_remotely(parameters: dict[str, object], log_level: str | None, *, as_json: bool) -> None:
    from slmops.tasks.report.records import DeployReport
    from slmops.tasks.request.inputs import FILE_PARAMETERS

    document = run_remotely("deploy", parameters, ("checkpoint", *FILE_PARAMETERS), log_level)
    _print_result(DeployReport.model_validate(document), as_json=as_json)


def _print_result(report: "DeployReport", *, as_json: bool) -> None:
    if as_json:
        print_json(report.to_contract())
    else:
        _show_report(report)
    end_with(report.status)


def _show_report(report: "DeployReport") -> None:
    from slmops.tasks.report.attempts import attempts_text
    from slmops.tasks.report.markdown import variant_rows
    from slmops.tasks.report.rejections import advice_lines
    from slmops.tasks.report.terminal import terminal_plots
    from slmops.tasks.report.wording import check_threshold, check_value, estimated, percent

    print_table(f"{report.reference} ({report.status})", variant_rows(report))
    print_plots(lambda width: terminal_plots(report, width))
    print_line("")
    print_line(report.summary)
    if report.reference_score:
        print_line(f"The source checkpoint scores {estimated(report.reference_score, percent)}.")
    if report.reason:
        print_line(f"Selected: {report.selected or 'none'}. {report.reason}")
    for variant in report.variants:
        if variant.error:
            print_line(f"{variant.precision} failed: {variant.error}")
        elif variant.gate and not variant.gate.passed:
            faults = "; ".join(
                f"{check.title} {check_value(check)}, {check_threshold(check)}" for check in variant.gate.failed_checks
            )
            print_line(f"{variant.precision} rejected: {faults}")
        if len(variant.attempts) > 1:
            print_line(f"{variant.precision} attempts: {attempts_text(variant.attempts)}")
    for line in advice_lines(report):
        print_line(line)
    for text in report.all_warnings:
        print_prose(f"warning: {text}")
    answered = next((variant for variant in reversed(report.variants) if variant.answer), None)  # the smallest
    if answered:
        print_answer(report.question, answered.foundry_model_id, answered.answer)
        print_line(f"Talk to it: slmops chat {report.reference}")
    if report.html_file:
        print_line(f"Report: {report.html_file}")


def _show_plan(plan: "DeployPlan") -> None:
    rows = [
        {
            "stage": stage.stage,
            "time": f"{stage.time_s:,.0f} s",
            "memory": f"{stage.ram_bytes / 1e9:.1f} GB",
            "disk": f"{stage.disk_bytes / 1e6:,.0f} MB",
        }
        for stage in plan.stages
    ]
    print_table(f"Plan for {plan.name}: {plan.parameters:,} parameters, {plan.rows} evaluation rows", rows)
    print_line(f"About {plan.time_s:,.0f} s in all. Estimates are for two cores.")
    print_statements(plan.statements)
    for text in plan.warnings:
        print_prose(f"warning: {text}")
