"""The report as HTML: one self-contained file, without scripts, fonts or requests, and blocks for Prefect's page."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from slmops.tasks.report.blocks import Block, spans
from slmops.tasks.report.document import document
from slmops.tasks.report.narrow import longest_word
from slmops.tasks.report.plots import Plot
from slmops.tasks.report.records import DeployReport

TEMPLATES = Path(__file__).parent / "templates"


def to_html(report: DeployReport, plots: Mapping[str, Plot]) -> str:
    """Return the report as an HTML page with the plots inline.

    Everything in the report is escaped; only the plots, which slmops draws, are not. If escaping fails, a content
    security policy keeps the browser from running or fetching anything.
    """
    page = (
        _environment(breaks=False)
        .get_template("report.html.j2")
        .render(
            report=report,
            blocks=document(report),
            plots=plots,
            style=(TEMPLATES / "report.css").read_text("utf-8"),
        )
    )
    return str(page).rstrip() + "\n"


def blocks_to_html(blocks: Sequence[Block]) -> str:
    """Return blocks without plots as HTML in one line, in which Markdown finds nothing to interpret.

    Long words may break: `<wbr>` leaves no character in what one copies. A line end in program text is a reference.
    """
    show = _environment(breaks=True).get_template("blocks.html.j2").module.show
    text = re.sub(r"<pre>.*?</pre>", lambda found: found[0].replace("\n", "&#10;"), str(show(blocks)), flags=re.S)
    return "".join(line.strip() for line in text.splitlines())


@cache
def _environment(*, breaks: bool) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spans"] = spans
    environment.filters["breaking"] = _breaking if breaks else _unchanged
    environment.globals["plots"] = {}
    return environment


def _unchanged(text: str, narrow: bool = False) -> str:
    return text


def _breaking(text: str, narrow: bool = False) -> Any:
    from markupsafe import Markup, escape

    pieces = re.sub(rf"\S{{{longest_word(narrow)}}}(?=\S)", lambda found: f"{found[0]}\0", text).split("\0")
    return Markup("<wbr>").join(escape(piece) for piece in pieces)
