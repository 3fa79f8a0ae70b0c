"""Stage "report": the report as Prefect artifacts, in the store and under the home directory."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from infra.settings import Settings
from infra.storage.registry import Manifest, ModelRegistry
from tasks.report.markdown import to_markdown, variant_rows
from tasks.report.records import DeployReport


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
