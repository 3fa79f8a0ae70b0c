"""The report as an HTML file and its plots, from records alone."""

import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from slmops.tasks.exams.endurance import MemoryGrowth
from slmops.tasks.exams.estimates import Estimate
from slmops.tasks.report.blocks import visible
from slmops.tasks.report.html import to_html
from slmops.tasks.report.plots import QualityPoint, draw_plots, pareto_front, quality_points
from slmops.tasks.report.records import VariantDetails
from tests.support.reports import full_report, full_variant
from tests.tasks.report.test_report import HOSTILE, hostile_report, report, variant

ELEMENTS = {"html", "head", "meta", "link", "title", "style", "body", "main", "div", "p", "ul", "li", "pre", "code"}
ELEMENTS |= {"h1", "h2", "h3", "h4", "strong", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd"}
ELEMENTS |= {"figure", "figcaption", "details", "summary"}
DRAWING = {"svg", "defs", "g", "path", "use", "text", "tspan", "rect", "clippath"}


class Page(HTMLParser):
    """What a browser finds in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_others_wrote_is_markup(text: str) -> None:
    page = Page(to_html(hostile_report(text), {}))
    assert page.elements <= ELEMENTS
    assert not [name for name in page.attributes if name.startswith("on")]
    assert visible(text) in page.text
    assert not set(page.text) & set("\x1b\x07\u202e")


def test_it_refers_to_nothing_outside_itself() -> None:
    shown = full_report()
    text = to_html(shown, draw_plots(shown))
    page = Page(text)
    assert page.elements <= ELEMENTS | DRAWING
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)|url\((?!#)|@import""", text)
    assert "default-src 'none'" in text
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r"""(?:href=["']|url\()#([^"')]+)""", text))
    assert used
    assert used <= set(page.ids)


def test_it_has_the_content_of_the_markdown() -> None:
    text = Page(to_html(full_report(), {})).text
    for part in ("int4 is chosen and serves as home:3.", "96.7% (93.3 to 99.2)", "slmops chat home@3", "1.31x"):
        assert part in text


def test_a_bare_report_is_a_page_too() -> None:
    failed = variant("int4", "failed", size_bytes=None, metrics={}, error="Olive could not build the model.")
    shown = report(failed, status="failed", version=None)
    page = Page(to_html(shown, draw_plots(shown)))
    assert "Olive could not build the model." in page.text
    assert "svg" not in page.elements


def test_plots_are_drawn_of_what_there_is() -> None:
    whole = full_variant("int4")
    drawn = {
        name: set(draw_plots(report(whole.model_copy(update={"details": details, "metrics": metrics}))))
        for name, details, metrics in (
            ("all", whole.details, whole.metrics),
            ("metrics", VariantDetails(), whole.metrics),
            ("nothing", VariantDetails(), {}),
            ("sweep", VariantDetails(length_sweep=whole.details.length_sweep), {}),
            ("soak", VariantDetails(endurance=whole.details.endurance), {}),
        )
    }
    assert drawn == {
        "all": {"quality", "throughput", "latency", "memory"},
        "metrics": {"quality", "throughput"},
        "nothing": set(),
        "sweep": {"latency"},
        "soak": {"memory"},
    }


def test_plots_are_small_and_well_formed_and_say_their_figures() -> None:
    for plot in draw_plots(full_report()).values():
        assert plot.png.startswith(b"\x89PNG")
        assert len(plot.png) < 40_000
        root = ElementTree.fromstring(plot.svg)
        assert root.attrib["viewBox"]
        words = "".join(root.itertext())
        assert ", " in words  # an axis and its unit
        assert "int4" in words
        assert "int4" in plot.alt
        assert "currentColor" in plot.svg
        assert "#010203" not in plot.svg


def test_equal_reports_have_equal_plots_and_the_library_is_as_it_was() -> None:
    import matplotlib as mpl

    before, had_pyplot = dict(mpl.rcParams), "matplotlib.pyplot" in sys.modules
    first, second = draw_plots(full_report()), draw_plots(full_report())
    assert first == second
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_a_single_request_and_many_variants_can_be_drawn() -> None:
    variants = [full_variant("int4", size_bytes=1_000_000 * size) for size in range(1, 10)]
    short = MemoryGrowth(rss_bytes=(5,), warmup_requests=0, bytes_per_request=Estimate(value=0, low=0, high=0))
    genai = variants[0].details.endurance[0].model_copy(update={"memory": short})
    variants[0] = variants[0].model_copy(update={"details": VariantDetails(endurance=(genai,))})
    assert set(draw_plots(full_report(*variants))) == {"quality", "throughput", "latency", "memory"}


def test_quality_is_the_score_else_exact_answers_else_agreement() -> None:
    whole = full_variant("int4")
    for dropped, title in (((), "score"), (("score",), "exact answers"), (("score", "exact_match"), "first choice")):
        metrics = {name: value for name, value in whole.metrics.items() if name not in dropped}
        found, (point,) = quality_points(report(whole.model_copy(update={"metrics": metrics})))
        assert found == title
        assert (point.interval is None) == (title == "exact answers")


def test_the_front_has_what_nothing_beats_in_size_and_quality() -> None:
    points = [
        QualityPoint(name, size, quality, None)
        for name, size, quality in (
            ("large", 4.0, 0.9),
            ("best", 3.0, 0.95),
            ("poor", 2.5, 0.5),
            ("small", 1.0, 0.8),
            ("twin", 1.0, 0.7),
        )
    ]
    assert [point.precision for point in pareto_front(points)] == ["small", "best"]
