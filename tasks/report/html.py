"""The report as one self-contained HTML file: without scripts, fonts or requests."""

from collections.abc import Mapping
from pathlib import Path

from slmops.tasks.report.blocks import spans
from slmops.tasks.report.document import document
from slmops.tasks.report.plots import Plot
from slmops.tasks.report.records import DeployReport

TEMPLATES = Path(__file__).parent / "templates"


def to_html(report: DeployReport, plots: Mapping[str, Plot]) -> str:
    """Return the report as an HTML page with the plots inline.

    Everything in the report is escaped; only the plots, which slmops draws, are not. If escaping fails, a content
    security policy keeps the browser from running or fetching anything.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spans"] = spans
    page = environment.get_template("report.html.j2").render(
        report=report,
        blocks=document(report),
        plots=plots,
        style=(TEMPLATES / "report.css").read_text("utf-8"),
    )
    return page.rstrip() + "\n"
