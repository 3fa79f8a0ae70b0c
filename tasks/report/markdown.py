"""The report as Markdown: pure functions of the record."""

from collections.abc import Sequence

from tasks.report.records import DeployReport, VariantReport

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
