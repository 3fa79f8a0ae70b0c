"""Stage "report": what a deploy did, as a record, as text, and as Prefect artifacts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from pydantic import BaseModel, ConfigDict

from infra.settings import Settings
from infra.storage.registry import Manifest, ModelRegistry
from tasks.checkpoint import PreparedCheckpoint
from tasks.evaluate import Evaluation, GateVerdict
from tasks.measure import Measurement
from tasks.request import DeployRequest

VariantStatus = Literal["registered", "rejected", "failed"]
DeployStatus = Literal["registered", "unchanged", "rejected", "failed"]

# What Microsoft's tutorial promises of each precision, as a share of the fp32 size.
PROMISED_SHARE_OF_FP32 = {"fp16": 0.5, "int8": 0.25, "int4": 0.125}
VARIANT_COLUMNS = ("precision", "verdict", "size", "of fp32", "Foundry id")
AT_MOST = ("kl_divergence", "quality_loss")
SHOWN_METRICS = {
    "load_ms": "load ms",
    "ttft_ms": "TTFT ms",
    "prompt_processing_throughput_tps": "prompt tok/s",
    "token_generation_throughput_tps": "new tok/s",
    "peak_rss_bytes": "peak RSS",
}


class VariantReport(BaseModel):
    """One variant of a deploy."""

    model_config = ConfigDict(frozen=True)

    precision: str
    status: VariantStatus
    size_bytes: int | None = None
    uri: str | None = None
    digest: str | None = None
    foundry_model_id: str | None = None
    recipe: str | None = None
    metrics: dict[str, float] = {}
    gate: GateVerdict | None = None
    answer: str | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class DeployReport(BaseModel):
    """What a deploy did; `slmops deploy --json` prints it."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: int | None
    status: DeployStatus
    aliases: tuple[str, ...] = ()
    variants: tuple[VariantReport, ...]
    checkpoint: str
    parameters: int
    evaluation: str
    reference_exact_match: float | None = None
    foundry_model_id: str | None = None
    foundry_dir: str
    question: str = ""
    description: str = ""
    report_file: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """`NAME@VERSION`, or `NAME` when no version came of it."""
        return f"{self.name}@{self.version}" if self.version else self.name

    def to_contract(self) -> dict[str, Any]:
        """Return the JSON document of `slmops deploy --json`."""
        return self.model_dump(mode="json")

    @property
    def summary(self) -> str:
        """One sentence on how it ended."""
        by_status = {
            status: [one.precision for one in self.variants if one.status == status]
            for status in ("registered", "rejected", "failed")
        }
        parts = [f"{', '.join(names)} {status}" for status, names in by_status.items() if names]
        lead = "unchanged: " if self.status == "unchanged" else ""
        return f"{self.reference} {lead}{'; '.join(parts)}."


def variant_metrics(measured: Measurement, evaluated: Evaluation) -> dict[str, float]:
    """Return a variant's figures as one flat record; what was not compared is left out."""
    quality = {
        "top1_agreement": evaluated.top1_agreement,
        "kl_divergence": evaluated.kl_divergence,
        "perplexity": evaluated.perplexity,
        "exact_match": evaluated.exact_match,
    }
    figures: dict[str, float] = {name: value for name, value in quality.items() if value is not None}
    for name, value in measured.metrics.items():
        figures[name] = value
    return figures


def in_order_of_size(variants: Sequence[VariantReport]) -> list[VariantReport]:
    """Return variants from the largest precision to the smallest."""
    return sorted(variants, key=lambda one: ("fp32", "fp16", "int8", "int4").index(one.precision))


def overall_status(variants: Sequence[VariantReport], *, unchanged: bool) -> DeployStatus:
    """Return a deploy's status from its variants': a failure weighs most, then what was registered."""
    statuses = {variant.status for variant in variants}
    if "failed" in statuses:
        return "failed"
    if "registered" in statuses:
        return "unchanged" if unchanged else "registered"
    return "rejected"


def failed_report(
    request: DeployRequest,
    prepared: PreparedCheckpoint,
    evaluation: str,
    failures: Sequence[VariantReport],
    settings: Settings,
) -> DeployReport:
    """Return the report of a deploy of which no variant could be built, so that no version came of it."""
    return DeployReport(
        name=request.name,
        version=None,
        status="failed",
        variants=tuple(failures),
        checkpoint=request.checkpoint,
        parameters=prepared.inspection.parameters,
        evaluation=evaluation,
        foundry_dir=str(settings.foundry_dir),
        description=request.description,
        warnings=prepared.inspection.warnings,
    )


def variant_rows(report: DeployReport) -> list[dict[str, str]]:
    """Return the report's table: one row a variant, column title -> text."""
    return [_variant_row(variant, report.parameters) for variant in report.variants]


def _variant_row(variant: VariantReport, parameters: int) -> dict[str, str]:
    row = {"precision": variant.precision, "verdict": variant.status, "size": "-", "of fp32": "-"}
    if variant.size_bytes is not None:
        row["size"] = megabytes(variant.size_bytes)
        if parameters:
            promised = PROMISED_SHARE_OF_FP32.get(variant.precision)
            row["of fp32"] = f"{variant.size_bytes / (4 * parameters):.3f}" + (f" ({promised})" if promised else "")
    for metric, title in SHOWN_METRICS.items():
        value = variant.metrics.get(metric)
        row[title] = "-" if value is None else _metric_text(metric, value)
    for name in ("top1_agreement", "kl_divergence", "exact_match"):
        value = variant.metrics.get(name)
        row[name.replace("_", " ")] = "-" if value is None else f"{value:.4f}"
    row["Foundry id"] = variant.foundry_model_id or "-"
    return row


def _metric_text(metric: str, value: float) -> str:
    if metric.endswith("_bytes"):
        return megabytes(int(value))
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def megabytes(size_bytes: int) -> str:
    """Return a size in MB (10^6 bytes)."""
    return f"{size_bytes / 1e6:,.1f} MB"


def to_markdown(report: DeployReport) -> str:
    """Return the report as Markdown; its tables stay narrow enough for the artifact's page."""
    rows = variant_rows(report)
    sections = [
        f"# {report.reference}: {report.status}",
        report.summary,
        f"Built from `{report.checkpoint}` ({report.parameters:,} parameters), judged on {report.evaluation}.",
        _markdown_table(_columns(rows, VARIANT_COLUMNS)),
        "*of fp32*: size as a share of the parameters in fp32; in brackets what Microsoft's tutorial promises.",
        f"## Speed and memory\n\n{_markdown_table(_columns(rows, ('precision', *SHOWN_METRICS.values())))}",
        _gate_section(report),
        _usage_section(report),
        _list_section("Failures", [f"{one.precision}: {one.error}" for one in report.variants if one.error]),
        _list_section(
            "Warnings",
            [*report.warnings, *(f"{one.precision}: {text}" for one in report.variants for text in one.warnings)],
        ),
        _list_section("Notes", [f"{one.precision}: {text}" for one in report.variants for text in one.notes]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _markdown_table(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return ""
    titles = list(rows[0])
    lines = [titles, ["---"] * len(titles), *([row[title] for title in titles] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _columns(rows: Sequence[dict[str, str]], titles: Sequence[str]) -> list[dict[str, str]]:
    return [{title: row[title] for title in titles} for row in rows]


def _gate_section(report: DeployReport) -> str:
    """Return one row a check and one column a variant; what failed is bold."""
    rows: dict[str, dict[str, str]] = {}
    for variant in report.variants:
        for check in variant.gate.checks if variant.gate else ():
            value = "not finite" if check.value is None else f"{check.value:.4g}"
            bound = "at most" if check.name in AT_MOST else "at least"
            text = f"{value} ({bound} {check.threshold:.4g})"
            blank = {"check": check.name.replace("_", " "), **{one.precision: "-" for one in report.variants}}
            rows.setdefault(check.name, blank)[variant.precision] = text if check.passed else f"**{text}**"
    if not rows:
        return ""
    reference = report.reference_exact_match
    heading = "" if reference is None else f"The reference answers {reference:.1%} of the evaluation set exactly.\n\n"
    return f"## Gate\n\n{heading}{_markdown_table(list(rows.values()))}"


def _usage_section(report: DeployReport) -> str:
    ids = [variant.foundry_model_id for variant in report.variants if variant.foundry_model_id]
    if not ids:
        return ""
    example = report.foundry_model_id or ids[0]
    lines = [
        "## Use",
        "Registered with Foundry Local: " + ", ".join(f"`{one}`" for one in dict.fromkeys([*ids, example])) + ".",
        f"```sh\nslmops chat {report.reference}\n```",
        "```python\n"
        "from foundry_local_sdk import CatalogType, Configuration, FoundryLocalManager\n\n"
        f'FoundryLocalManager.initialize(Configuration(app_name="app", model_cache_dir={report.foundry_dir!r}))\n'
        "catalog = FoundryLocalManager.instance.get_catalog(CatalogType.LOCAL)\n"
        f'model = catalog.get_model_variant("{example}")\n'
        "model.load()\n```",
    ]
    answers = [f"- {one.precision} answered: `{one.answer}`" for one in report.variants if one.answer]
    return "\n\n".join([*lines, "\n".join(answers)])


def _list_section(title: str, items: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {item}" for item in items) if items else ""


@task(name="publish report", task_run_name="report-{report.name}", tags=["slmops"])
def publish_report(
    report: DeployReport, registry: ModelRegistry, manifest: Manifest | None, settings: Settings
) -> DeployReport:
    """Post the report as Prefect artifacts, and keep it in the store and under the home directory.

    Returns the report with the path of that file.
    """
    if manifest:
        path = settings.home_dir / "reports" / f"{manifest.reference}.md"
        report = report.model_copy(update={"report_file": str(path)})
    text = to_markdown(report)
    key = f"slmops-{report.name}"
    create_markdown_artifact(markdown=text, key=key, description=report.summary)
    create_table_artifact(
        table=_artifact_rows(report), key=f"{key}-variants", description=f"Variants of {report.reference}"
    )
    if manifest is None:
        return report
    create_link_artifact(
        link=registry.uri(manifest),
        link_text=f"{manifest.reference} in the store",
        key=f"{key}-version",
        description="Manifest of the stored version",
    )
    registry.put_report(manifest, "report.md", text)
    registry.add_evidence(manifest, "deploy", report.model_dump())
    write_report_file(path, text)
    return report


def _artifact_rows(report: DeployReport) -> list[dict[str, Any]]:
    return [dict(row) for row in variant_rows(report)]


def write_report_file(path: Path, text: str) -> None:
    """Replace a report file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".aside")
    aside.write_text(text, "utf-8")
    aside.replace(path)
