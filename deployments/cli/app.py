"""The command line `slmops`. Heavy imports happen inside the commands that need them."""

import gc
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmops.deployments.cli.catalog import add_catalog_command
from slmops.deployments.cli.champion import add_promotion_commands
from slmops.deployments.cli.output import print_error, print_json, print_line, print_plots, print_table, stage_display
from slmops.deployments.cli.references import Json, Reference, Version, load_settings, the_registry, version_of
from slmops.deployments.cli.retrain import add_retrain_command
from slmops.deployments.cli.serve import add_serve_command
from slmops.deployments.cli.store import add_store_commands
from slmops.deployments.cli.up import add_up_command
from slmops.infra.errors import BadInput, SlmopsError

if TYPE_CHECKING:
    from slmops.deployments.server.embedded import EmbeddedServer
    from slmops.infra.settings import Settings

# Typer carries a copy of click of its own, whose names it keeps to itself: the root of its usage errors.
UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

DEMO_NAME = "home"
DEMO_SEED = 0

app = typer.Typer(
    name="slmops",
    help="From a fine-tuned small language model to Foundry Local in one flow.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

EvalFile = Annotated[str | None, typer.Option("--eval", help="JSONL rows {id, messages, expected}.")]
Scorer = Annotated[
    str | None,
    typer.Option(
        help="exact_match (default), normalized_match, contains, regex, json_equality, rouge_l or numeric; "
        'or JSON {"name": ..., options}.'
    ),
]
OutputSchema = Annotated[str | None, typer.Option(help="JSON Schema file that every answer must conform to.")]
OutputRegex = Annotated[str | None, typer.Option(help="Regular expression that every answer must match.")]
TextFile = Annotated[str | None, typer.Option("--text", help="UTF-8 text to take perplexity and distributions on.")]
BudgetLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="KEY=VALUE",
        help="max-size=300MB, max-rss=1GB, max-ttft=200ms, min-tps=20, max-quality-loss=0.02; repeatable.",
    ),
]
LogLevel = Annotated[str | None, typer.Option(help="Show the run's log: debug, info, warning or error.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command and end with its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    gc.set_threshold(10_000)  # imports make much and drop little: looking for garbage was a tenth of their time
    status = run(arguments)
    gc.freeze()  # at its end the interpreter would look through all that Prefect brought: half a second
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns 0 done, 1 failed, 2 bad usage or input, 3 every variant rejected."""
    as_json = "--json" in arguments
    try:
        status = app(args=list(arguments), standalone_mode=False)
    except SlmopsError as error:
        print_error(error, as_json=as_json)
        return error.exit_code
    except UsageError as error:
        message = str(error.format_message())  # type: ignore[attr-defined]
        print_error(BadInput(f"{message.rstrip('.')}.", "See slmops --help."), as_json=as_json)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        advice = "Run the command again: it goes on from the stages that are done."
        print_error(SlmopsError("Interrupted.", advice), as_json=as_json)
        return 1
    return status if isinstance(status, int) else 0


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Options of slmops itself."""
    if version:
        from importlib import metadata

        print_line(f"slmops {metadata.version('slmops')}")
    elif context.invoked_subcommand is None:
        print_line(context.get_help())


@app.command()
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


@app.command()
def check(
    checkpoint: Annotated[str | None, typer.Argument(help="Checkpoint that the machine must have room for.")] = None,
    source_build: Annotated[bool, typer.Option(help="Also check what building onnxruntime-genai needs.")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: Python, packages against the proven versions, Foundry's runtime, memory and disk."""
    settings = load_settings()
    _prepare(settings)
    from slmops.tasks.environment.checks import check_machine

    checks = check_machine(settings, checkpoint, source_build=source_build)
    failed = [one for one in checks if not one.ok]
    if as_json:
        print_json({"ok": not failed, "checks": [one.model_dump() for one in checks]})
    else:
        rows = [
            {
                "check": one.name,
                "needed": one.required,
                "found": one.found,
                "verdict": "ok" if one.ok else "failed",
                "what to do": one.what_to_do,
            }
            for one in checks
        ]
        print_table("Environment", rows)
    if failed:
        raise typer.Exit(1)


@app.command("make-demo")
def make_demo(
    directory: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.")] = DEMO_SEED,
    as_json: Json = False,
) -> None:
    """Train a small chat model that turns smart-home commands into JSON actions."""
    settings = load_settings()
    made = _make_demo(settings, directory, seed)
    if as_json:
        print_json({"checkpoint": str(directory), **made})
        return
    print_line(f"{directory}: {made['parameters']:,} parameters, {made['exact_match']:.1%} of held-out commands exact.")


def _make_demo(settings: "Settings", directory: Path, seed: int, *, replace: bool = False) -> dict[str, Any]:
    _prepare(settings)
    from slmops.tasks.training.demo import make_demo_checkpoint

    with stage_display() as display:
        made = make_demo_checkpoint(
            settings,
            directory,
            seed,
            lambda done, total, what: display("train", done / total, what),
            replace=replace,
        )
    return {"parameters": made.parameters, "exact_match": made.exact_match}


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.")] = DEMO_SEED,
    log_level: LogLevel = None,
    as_json: Json = False,
) -> None:
    """Make the demo checkpoint, deploy it as `home`, and ask it to turn on a light."""
    settings = load_settings()
    checkpoint = settings.home_dir / "demo"
    _make_demo(settings, checkpoint, seed, replace=True)
    _deploy(settings, {"checkpoint": str(checkpoint), "name": DEMO_NAME}, log_level, as_json)


@app.command()
def deploy(
    checkpoint: Annotated[str, typer.Argument(help="Folder, Hub id (owner/name), s3:// folder or store:// address.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    precision: Annotated[list[str] | None, typer.Option(help="fp16, int8 or int4; repeatable. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="Device that will serve: cpu or gpu.")] = "cpu",
    provider: Annotated[str, typer.Option(help="Execution provider: cpu, cuda, dml or webgpu.")] = "cpu",
    eval_file: EvalFile = None,
    scorer: Scorer = None,
    output_schema: OutputSchema = None,
    output_regex: OutputRegex = None,
    text: TextFile = None,
    base: Annotated[str | None, typer.Option(help="Base of a LoRA adapter: folder or Hub id.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="Jinja file in place of the tokenizer's own.")] = None,
    model_config: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="max_length, temperature, top_p, repetition_penalty; repeatable."),
    ] = None,
    description: Annotated[str, typer.Option(help="What the model is for.")] = "",
    olive_config: Annotated[str | None, typer.Option(help="Olive run configuration in place of the recipes.")] = None,
    output: Annotated[str | None, typer.Option(help="New folder for a plain copy of what is built.")] = None,
    min_top1_agreement: Annotated[float | None, typer.Option(help="Gate, 0 to 1.")] = None,
    max_kl_divergence: Annotated[float | None, typer.Option(help="Gate, nats per token.")] = None,
    max_quality_loss: Annotated[float | None, typer.Option(help="Gate, 0 to 1.")] = None,
    budget: BudgetLimits = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipe in place of a precision's default; repeatable. See slmops recipes.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Try several recipes per precision; keep the best.")] = False,
    promote: Annotated[bool, typer.Option("--promote", help="Make this version the champion.")] = False,
    training_run: Annotated[str | None, typer.Option(help="Training run that made the checkpoint: id or URL.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and end.")] = False,
    log_level: LogLevel = None,
    as_json: Json = False,
) -> None:
    """Build, store, measure, judge, register and prove a checkpoint."""
    parameters: dict[str, Any] = {
        "checkpoint": checkpoint,
        "name": name,
        "device": device,
        "execution_provider": provider,
        "base": base,
        "revision": revision,
        "description": description,
        **_evaluation_parameters(eval_file, scorer, output_schema, output_regex, text),
        "budget": budget or [],
        "recipes": recipe or [],
        "search": search,
        "chat_template_file": chat_template,
        "min_top1_agreement": min_top1_agreement,
        "max_kl_divergence": max_kl_divergence,
        "max_quality_loss": max_quality_loss,
        "olive_config_file": olive_config,
        "output": output,
        "promote": promote,
        "training_run": training_run,
        **_parse_model_config(model_config or []),
    }
    if precision:
        parameters["precisions"] = precision
    settings = load_settings()
    if dry_run:
        _show_plan(settings, parameters, as_json)
        return
    _deploy(settings, parameters, log_level, as_json)


def _evaluation_parameters(
    eval_file: str | None, scorer: str | None, output_schema: str | None, output_regex: str | None, text: str | None
) -> dict[str, str | None]:
    return {
        "evaluation_file": eval_file,
        "scorer": scorer,
        "output_schema_file": output_schema,
        "output_regex": output_regex,
        "text_file": text,
    }


def _parse_model_config(pairs: Sequence[str]) -> dict[str, float]:
    kinds: dict[str, type[int] | type[float]] = {
        "max_length": int,
        "temperature": float,
        "top_p": float,
        "repetition_penalty": float,
    }
    values: dict[str, float] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key not in kinds:
            raise BadInput(f"The model config {pair!r} is unknown.", f"Write KEY=VALUE with one of {', '.join(kinds)}.")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            raise BadInput(
                f"The model config {pair!r} has no valid number.", "Write, for example, top_p=0.9."
            ) from None
    return values


def _deploy(settings: "Settings", parameters: dict[str, Any], log_level: str | None, as_json: bool) -> None:
    _prepare(settings, log_level)
    from slmops.deployments.server.environment import begin_embedded_server

    server = begin_embedded_server()  # its imports and those of the plan take as long
    try:
        from slmops.tasks.request.plan import plan_deploy

        plan_deploy(settings, parameters)  # refuses bad input before anything is written
    except BaseException:
        if server:
            server.end()
        raise
    report = _run_flow("deploy", parameters, settings, server)
    _end_with(report, as_json)


def _end_with(report: Any, as_json: bool) -> None:
    if as_json:
        print_json(report.to_contract())
    else:
        _show_report(report)
    if report.status in ("rejected", "failed"):
        raise typer.Exit(3 if report.status == "rejected" else 1)


def _run_flow(
    flow_name: str, parameters: dict[str, Any], settings: "Settings", server: "EmbeddedServer | None" = None
) -> Any:
    """Run a flow in this process, show its stages, and return its report also where it ended as failed.

    `server` is one that has begun its start already.
    """
    from slmops.deployments.server.environment import begin_embedded_server, prefect_api

    server = server or begin_embedded_server()
    from slmops.flows.endings import RunEnded
    from slmops.tasks.runs.progress import listening

    flow = getattr(import_module(f"slmops.flows.{flow_name}"), flow_name)
    with stage_display() as display, listening(display), prefect_api(settings, server):
        state = flow(**parameters, return_state=True)
    result = state.result(raise_on_failure=False)
    if isinstance(result, RunEnded):
        return result.report
    if isinstance(result, BaseException):
        raise _as_slmops_error(result, settings)
    return result


def _as_slmops_error(error: BaseException, settings: "Settings") -> BaseException:
    if isinstance(error, SlmopsError | KeyboardInterrupt):
        return error
    import traceback

    log = settings.cache_dir / "logs" / "unexpected-error.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(traceback.format_exception(error)), "utf-8")
    return SlmopsError(
        f"An unexpected error ended the run: {type(error).__name__}: {error}.",
        f"This is a fault of slmops or of its environment; the details are in {log}.",
    )


def _prepare(settings: "Settings", log_level: str | None = None) -> None:
    """Set Prefect's environment; every command that imports `tasks` or `flows` calls it first."""
    from slmops.deployments.server.environment import prepare_prefect

    if log_level and log_level.lower() not in ("debug", "info", "warning", "error"):
        raise BadInput(f"The log level {log_level!r} is unknown.", "Use debug, info, warning or error.")
    prepare_prefect(settings, log_level=log_level)


def _show_report(report: Any) -> None:
    from slmops.tasks.report.markdown import variant_rows
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
                f"{check.name.replace('_', ' ')} {check_value(check)}, {check_threshold(check)}"
                for check in variant.gate.failed_checks
            )
            print_line(f"{variant.precision} rejected: {faults}")
    for text in [*report.warnings, *(text for one in report.variants for text in one.warnings)]:
        print_line(f"warning: {text}")
    answered = next((one for one in reversed(report.variants) if one.answer), None)  # the smallest
    if answered:
        print_line(f"Foundry Local answered {report.question!r} through {answered.foundry_model_id}: {answered.answer}")
        print_line(f"Talk to it: slmops chat {report.reference}")
    if report.html_file:
        print_line(f"Report: {report.html_file}")


def _show_plan(settings: "Settings", parameters: dict[str, Any], as_json: bool) -> None:
    _prepare(settings)
    from slmops.tasks.request.plan import plan_deploy

    plan = plan_deploy(settings, parameters)
    if as_json:
        print_json(plan.model_dump(mode="json"))
        return
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
    for text in plan.warnings:
        print_line(f"warning: {text}")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the versions in the store."""
    registry = the_registry()
    models: list[dict[str, Any]] = []
    for name in registry.names():
        for manifest in registry.versions(name):
            status = _statuses(registry, manifest)
            models.append(
                {
                    "name": name,
                    "version": manifest.version,
                    "aliases": list(registry.aliases_of(manifest)),
                    "tags": registry.tags(manifest),
                    "created_at": manifest.created_at,
                    "says_origin": registry.of(manifest).says_origin,
                    "variants": [
                        {
                            "precision": variant.precision,
                            "status": status.get(variant.precision),
                            "size_bytes": variant.size_bytes,
                        }
                        for variant in manifest.variants
                    ],
                }
            )
    if as_json:
        print_json({"models": models})
        return
    rows = [
        {
            "version": f"{model['name']}@{model['version']}",
            "aliases": ", ".join(model["aliases"]) or "-",
            "tags": ", ".join(f"{tag}={value}" for tag, value in model["tags"].items()) or "-",
            "variants": ", ".join(
                f"{one['precision']} {one['status'] or 'not judged'} ({one['size_bytes'] / 1e6:,.1f} MB)"
                for one in model["variants"]
            )
            + (", says its origin" if model["says_origin"] else ""),
        }
        for model in models
    ]
    print_table("Models", rows)
    if not rows:
        print_line("The store is empty. Start with: slmops deploy CHECKPOINT --name NAME")


@app.command()
def show(reference: Reference, as_json: Json = False) -> None:
    """Show a version: its source, files and evidence."""
    from slmops.infra.storage.signatures import is_signed

    registry, manifest = version_of(reference)
    deployed = registry.latest_evidence(manifest, "deploy") or {}
    says_origin = registry.of(manifest).says_origin
    if as_json:
        kept = {"aliases": registry.aliases_of(manifest), "tags": registry.tags(manifest), "deploy": deployed}
        notes = [{"at": at, "text": text} for at, text in registry.notes(manifest)]
        signed = {"signed": is_signed(registry, manifest), "digest": manifest.digest, "uri": registry.uri(manifest)}
        print_json({**manifest.model_dump(), **kept, "says_origin": says_origin, "notes": notes, **signed})
        return
    print_line(
        f"{manifest.reference}  {manifest.created_at}  aliases: {', '.join(registry.aliases_of(manifest)) or '-'}"
    )
    print_line(
        f"source: {manifest.source.origin} ({manifest.source.architecture}, {manifest.source.parameters:,} parameters)"
    )
    print_line(f"        sha256 {manifest.source.digest}")
    if manifest.source.training_run:
        print_line(f"training run: {manifest.source.training_run}")
    print_line(f"stored: {registry.uri(manifest)}")
    print_line(f"        sha256 {manifest.digest}, {'signed' if is_signed(registry, manifest) else 'not signed'}")
    for tag, value in registry.tags(manifest).items():
        print_line(f"tag: {tag}={value}")
    for at, text in registry.notes(manifest):
        print_line(f"note of {at[:19]}: {text}")
    print_line("built by: " + ", ".join(f"{name} {number}" for name, number in manifest.builder.items()))
    files = [
        {"variant": variant.precision, "file": file.path, "size": f"{file.size_bytes:,}", "sha256": file.sha256[:16]}
        for variant in manifest.variants
        for file in variant.files
    ]
    print_table("Files", files)
    statuses = [
        {"variant": precision, "status": status or "not judged"}
        for precision, status in _statuses(registry, manifest).items()
    ]
    print_table("Variants (says its origin)" if says_origin else "Variants", statuses)


def _statuses(registry: Any, manifest: Any) -> dict[str, str | None]:
    deployed = registry.latest_evidence(manifest, "deploy") or {"variants": []}
    found = {one["precision"]: one["status"] for one in deployed["variants"]}
    return {variant.precision: found.get(variant.precision) for variant in manifest.variants}


@app.command()
def regate(
    reference: Version,
    eval_file: EvalFile = None,
    scorer: Scorer = None,
    output_schema: OutputSchema = None,
    output_regex: OutputRegex = None,
    text: TextFile = None,
    budget: BudgetLimits = None,
    min_top1_agreement: Annotated[float | None, typer.Option(help="Gate, 0 to 1.")] = None,
    max_kl_divergence: Annotated[float | None, typer.Option(help="Gate, nats per token.")] = None,
    max_quality_loss: Annotated[float | None, typer.Option(help="Gate, 0 to 1.")] = None,
    log_level: LogLevel = None,
    as_json: Json = False,
) -> None:
    """Judge a version again, without building it, and register or unregister its variants accordingly."""
    settings = load_settings()
    version_of(reference)
    parameters = {
        "reference": reference,
        **_evaluation_parameters(eval_file, scorer, output_schema, output_regex, text),
        "budget": budget,
        "min_top1_agreement": min_top1_agreement,
        "max_kl_divergence": max_kl_divergence,
        "max_quality_loss": max_quality_loss,
    }
    _prepare(settings, log_level)
    report = _run_flow("regate", parameters, settings)
    _end_with(report, as_json)


@app.command()
def benchmark(
    reference: Reference,
    lm_eval_task: Annotated[
        list[str] | None, typer.Option(help="Task of lm-eval, or of --lm-eval-include; repeatable.")
    ] = None,
    lm_eval_include: Annotated[str | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each lm-eval task; default: all.")] = None,
    lm_eval_chat_template: Annotated[
        bool, typer.Option("--lm-eval-chat-template", help="Ask through the chat template.")
    ] = False,
    lm_eval_allow_network: Annotated[
        bool, typer.Option("--lm-eval-allow-network", help="Let lm-eval fetch its data.")
    ] = False,
    lm_eval_allow_code: Annotated[
        bool, typer.Option("--lm-eval-allow-code", help="Let the folder's tasks run Python code.")
    ] = False,
    lm_eval_on_checkpoint: Annotated[
        bool, typer.Option("--lm-eval-on-checkpoint", help="Run the tasks on the source checkpoint too.")
    ] = False,
    log_level: LogLevel = None,
    as_json: Json = False,
) -> None:
    """Measure a stored version anew, beside its earlier figures on this machine; run standard benchmarks on it."""
    settings = load_settings()
    version_of(reference)
    parameters = {
        "reference": reference,
        "lm_eval_tasks": lm_eval_task or [],
        "lm_eval_include": lm_eval_include,
        "lm_eval_limit": limit,
        "lm_eval_chat_template": lm_eval_chat_template,
        "lm_eval_allow_network": lm_eval_allow_network,
        "lm_eval_allow_code": lm_eval_allow_code,
        "lm_eval_on_checkpoint": lm_eval_on_checkpoint,
    }
    _prepare(settings, log_level)
    report = _run_flow("benchmark", parameters, settings)
    if as_json:
        print_json(report.to_contract())
        return
    from slmops.tasks.report.benchmark import benchmark_rows, lm_eval_rows

    print_table("Figures", benchmark_rows(report))
    print_table("lm-eval", lm_eval_rows(report))
    print_line(report.summary)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes that --recipe takes, and that --search tries."""
    _prepare(load_settings())
    from slmops.tasks.build.build import OLIVE_PROVIDERS, known_recipes
    from slmops.tasks.request.parameters import PRECISIONS

    found = [
        {"recipe": name, "precision": precision, "execution_provider": provider}
        for provider in OLIVE_PROVIDERS
        for precision in PRECISIONS
        for name in known_recipes(precision, provider)
    ]
    if as_json:
        print_json({"recipes": found})
    else:
        print_table("Recipes", found)


@app.command()
def logs(reference: Reference) -> None:
    """Print the build logs of a version."""
    registry, manifest = version_of(reference)
    for record in registry.evidence(manifest, "build"):
        print_line(
            f"== {record['precision']}: built in {record['wall_s']:.1f} s, peak {record['peak_rss_bytes'] / 1e9:.2f} GB"
        )
        print_line(record["log"].rstrip() or "(no output)")


@app.command()
def delete(
    reference: Version,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Unregister a version and remove it from the store; its number is never used again. Or remove an input."""
    from slmops.infra.storage.garbage import delete_version
    from slmops.infra.storage.inputs import is_input_address

    settings = load_settings()
    if is_input_address(reference):
        _delete_input(reference, yes=yes)
        return
    registry, manifest = version_of(reference)
    if "@" not in reference:
        raise BadInput(f"{reference!r} names no version.", f"Write, for example, {manifest.reference}.")
    if not yes and not typer.confirm(f"Delete {manifest.reference} and unregister it?", err=True):
        raise typer.Exit(1)
    _prepare(settings)
    from slmops.tasks.foundry.registration import unregister_version

    unregister_version(manifest, settings)
    freed = delete_version(registry.of(manifest))
    print_line(f"Deleted {manifest.reference}; {(freed or 0) / 1e6:,.1f} MB freed.")


def _delete_input(address: str, *, yes: bool) -> None:
    from slmops.infra.storage.inputs import delete_input, read_input

    registry = the_registry()
    found = read_input(registry, address)
    if not yes and not typer.confirm(f"Delete {address} ({found.name}) from the store?", err=True):
        raise typer.Exit(1)
    delete_input(registry, address)
    print_line(f"Deleted {address} ({found.name}); slmops gc frees its bytes.")


@app.command()
def unregister(reference: Reference) -> None:
    """Take a version out of Foundry Local; it stays in the store."""
    settings = load_settings()
    _, manifest = version_of(reference)
    _prepare(settings)
    from slmops.tasks.foundry.registration import unregister_version

    removed = unregister_version(manifest, settings)
    print_line(f"Unregistered {', '.join(removed) or 'nothing: ' + manifest.reference + ' was not registered'}.")


@app.command()
def chat(reference: Reference) -> None:
    """Talk to a registered model through Foundry Local; an empty line ends the chat."""
    settings = load_settings()
    registry, manifest = version_of(reference)
    from slmops.deployments.cli.chat import chat_with

    chat_with(registry, manifest, settings)


@app.command("foundry-dir")
def foundry_dir() -> None:
    """Print the directory for `foundry cache cd`."""
    print_line(str(load_settings().foundry_dir))


add_store_commands(app)
add_serve_command(app)
add_promotion_commands(app, _prepare, _run_flow)
add_retrain_command(app, _prepare, _run_flow)
add_catalog_command(app)
add_up_command(app, _prepare)

if __name__ == "__main__":
    main()
