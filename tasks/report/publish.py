"""Stage "report": the report as Prefect artifacts, in the store and under the home directory."""

import base64
import os
from collections.abc import Mapping
from pathlib import Path

from prefect.artifacts import Artifact, create_markdown_artifact, create_table_artifact

from slmops.infra.files import write_whole
from slmops.infra.foundry.model_folder import MODEL_CARD
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import DEPLOY, Deployed
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.version import Version
from slmops.tasks.report.blocks import Block, Code, Heading, Link, Listing, Paragraph
from slmops.tasks.report.html import to_html
from slmops.tasks.report.markdown import blocks_to_markdown, to_markdown, variant_rows
from slmops.tasks.report.model_card import base_model_of, model_card
from slmops.tasks.report.models import post_models
from slmops.tasks.report.plot_cache import draw_once
from slmops.tasks.report.plots import Plot
from slmops.tasks.report.records import DeployReport
from slmops.tasks.runs.artifacts import shown_in_prefect, shown_rows
from slmops.tasks.runs.events import VERSION_REGISTERED, VERSION_REJECTED, tell
from slmops.tasks.runs.stage import stage

EVENTS = {"registered": VERSION_REGISTERED, "rejected": VERSION_REJECTED}


@stage("publish report", run_name="report-{report.name}")
def publish_report(report: DeployReport, version: Version | None, settings: Settings) -> DeployReport:
    """Post the report as Prefect artifacts and an event, and keep it in the store and under the home directory.

    The artifact of type `json` is the document that `slmops deploy --json` prints.

    Returns the report with the paths of its Markdown and HTML files; without a version there are none.
    """
    # matplotlib writes a cache of fonts. It must be under slmops's home directory too.
    os.environ.setdefault("MPLCONFIGDIR", str(settings.cache_dir / "matplotlib"))
    plots = draw_once(report, settings.cache_dir / "plots")
    if version is None:
        _post_artifacts(report, None, plots)
        return report
    texts = {"md": to_markdown(report), "html": to_html(report, plots)}
    paths = {kind: settings.home_dir / "reports" / f"{version.reference}.{kind}" for kind in texts}
    report = report.model_copy(update={"report_file": str(paths["md"]), "html_file": str(paths["html"])})
    for kind, text in texts.items():
        version.put_report(f"report.{kind}", text)
    version.record(DEPLOY, Deployed.model_validate(report.model_dump(mode="json")))
    for kind, text in texts.items():
        write_whole(paths[kind], text)
    _post_artifacts(report, version, plots)
    post_models(version.registry)
    if report.status in EVENTS:
        precisions = [variant.precision for variant in report.variants if variant.status == "registered"]
        tell(EVENTS[report.status], report.name, report.reference, report.summary, precisions=precisions)
    return report


def _post_artifacts(report: DeployReport, version: Version | None, plots: Mapping[str, Plot]) -> None:
    key, rows, document = f"slmops-{report.name}", _artifact_rows(report), report.model_dump(mode="json")
    with shown_in_prefect("The report"):
        shown = artifact_markdown(report, plots)
        posted = create_markdown_artifact(markdown=shown, key=key, description=report.summary)
        create_table_artifact(table=rows, key=f"{key}-variants", description=f"Variants of {report.reference}")
        Artifact(type="json", key=f"{key}-document", description=report.summary, data=document).create()
        if version:
            create_markdown_artifact(
                markdown=version_markdown(version, posted),
                key=f"{key}-version",
                description=f"Where {version.reference} is stored",
            )


def link_to_reports(name: str) -> Link:
    """Return a link from an artifact's page in Prefect's UI to the reports of a model, the newest first.

    It is relative, because a run does not know at which address a browser sees the UI: through a tunnel, a proxy, or
    after `slmops up` serves what a single command has posted.
    """
    return Link(f"The report of {name}", f"../key/slmops-{name}")


def version_markdown(version: Version, report_artifact: object) -> str:
    """Return the Markdown of the artifact that leads to a version, with a link to its report's artifact.

    No browser follows a link into the store (`file://`, `s3://`), so its address is text to copy.
    """
    commands = f"slmops show {version.reference}\nslmops open {version.reference}"
    blocks: list[Block] = [
        Heading(version.reference, 1),
        Paragraph(Link(f"The report of {version.reference}", f"../artifact/{report_artifact}")),
        Paragraph(("Its manifest in the store: ", Code(version.uri))),
        Listing(commands, "sh"),
    ]
    return blocks_to_markdown(blocks, {})


def artifact_markdown(report: DeployReport, plots: Mapping[str, Plot]) -> str:
    """Return the report for Prefect's page, with the plots as data URLs: below 200 kB for three variants."""
    return to_markdown(report, {name: image_data(plot) for name, plot in plots.items()})


def image_data(plot: Plot) -> str:
    """Return a plot as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(plot.png).decode()}"


def _artifact_rows(report: DeployReport) -> list[dict[str, object]]:
    return shown_rows(variant_rows(report))


@stage("write model cards", run_name="model-cards-{report.name}")
def write_model_cards(report: DeployReport, manifest: Manifest, output: str) -> None:
    """Put a model card into each variant's folder of a plain copy."""
    for variant in report.variants:
        folder = Path(output).expanduser() / variant.precision
        if folder.is_dir():
            card = model_card(
                manifest,
                variant,
                evaluation=report.evaluation,
                description=report.description,
                base_model=base_model_of(manifest.source.origin),
            )
            write_whole(folder / MODEL_CARD, card)
