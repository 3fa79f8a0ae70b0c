"""The report's plots: SVG for the HTML page, PNG for Prefect's."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slmops.infra.transformers.calls import Loss
from slmops.tasks.exams.estimates import Estimate
from slmops.tasks.report.records import DeployReport, VariantReport
from slmops.tasks.report.wording import decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter


PlotName = Literal["quality", "throughput", "latency", "memory", "losses"]

# Okabe and Ito (2008), Color Universal Design, without yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")  # the shape carries the same information as the colour
MAX_SOAKED = 3  # more lines cannot be distinguished; then only the chosen variant is shown
WIDTH_IN, HEIGHT_IN = 4.6, 2.9
PNG_DPI = 140  # 644 pixels wide: a little more than Prefect's column
PNG_COLOURS = 64
# matplotlib writes colours unchanged. This one, which no plot uses, is replaced by the page's text colour.
_INK = "#010203"
_GRID = "#888888"


@dataclass(frozen=True)
class Plot:
    """One plot; `alt` describes its figures for readers who cannot see it."""

    name: PlotName
    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class QualityPoint:
    """A variant in the plot of quality against size: MB, and a share."""

    precision: str
    size_mb: float
    quality: float
    interval: Estimate | None


def quality_points(report: DeployReport) -> tuple[str, list[QualityPoint]]:
    """Return the plot's measure of quality, and each variant that has this figure.

    The score if there is one, else the share of exact answers, else the agreement with the checkpoint.
    """
    sized = [variant for variant in report.variants if variant.size_bytes]
    for metric, title in (("score", "score"), ("exact_match", "exact answers"), ("top1_agreement", "first choice")):
        points = [
            QualityPoint(
                variant.precision, (variant.size_bytes or 0) / 1e6, variant.metrics[metric], _interval(variant, metric)
            )
            for variant in sized
            if metric in variant.metrics
        ]
        if points:
            return title, points
    return "", []


def _interval(variant: VariantReport, metric: str) -> Estimate | None:
    evaluated = variant.details.evaluation
    if evaluated is None or metric == "exact_match":
        return None
    return evaluated.score if metric == "score" else evaluated.top1_agreement_interval


def pareto_front(points: Sequence[QualityPoint]) -> list[QualityPoint]:
    """Return the points that no other point beats in both size and quality, smallest first."""
    front: list[QualityPoint] = []
    for point in sorted(points, key=lambda point: (point.size_mb, -point.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front


def draw_plots(report: DeployReport) -> dict[str, Plot]:
    """Draw every plot that has figures; about 0.2 s each, and half a second for loading matplotlib."""
    drawn = [_quality(report), _throughput(report), _latency(report), _memory(report)]
    return {plot.name: plot for plot in drawn if plot}


def _styles(report: DeployReport) -> dict[str, tuple[str, str]]:
    """Return each variant's colour and marker: the same in every plot."""
    return {
        variant.precision: (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
        for index, variant in enumerate(report.variants)
    }


def _quality(report: DeployReport) -> Plot | None:
    title, points = quality_points(report)
    if not points:
        return None
    figure, (axes,) = _canvas()
    front = pareto_front(points)
    axes.plot(
        [point.size_mb for point in front], [point.quality for point in front], color=_GRID, linewidth=1, zorder=1
    )
    for point in points:
        colour, marker = _styles(report)[point.precision]
        if point.interval:
            axes.vlines(point.size_mb, point.interval.low, point.interval.high, color=colour, linewidth=1.5)
        axes.plot(point.size_mb, point.quality, marker, color=colour, markersize=7)
        if point.precision == report.selected:
            ring: dict[str, Any] = {
                "markerfacecolor": "none",
                "markeredgecolor": _INK,
                "markersize": 13,
                "markeredgewidth": 1.5,
            }
            axes.plot(point.size_mb, point.quality, "o", **ring)
        axes.annotate(point.precision, (point.size_mb, point.quality), (8, -13), textcoords="offset points")
    reference = _reference_quality(report, title)
    if reference is not None:
        axes.axhline(reference, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "checkpoint", (0, reference), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points"
        )
    axes.margins(y=0.2)
    axes.set_xlim(0, 1.2 * max(point.size_mb for point in points))
    axes.set_xlabel("size, MB")
    axes.yaxis.set_major_formatter(_percent_axis())
    axes.set_ylabel(f"{title}, %")
    described = "; ".join(f"{point.precision} {point.size_mb:,.1f} MB, {point.quality:.1%}" for point in points)
    return _plot("quality", f"Size and {title}: {described}.", figure)


def _reference_quality(report: DeployReport, title: str) -> float | None:
    evaluations = [variant.details.evaluation for variant in report.variants if variant.details.evaluation]
    if title == "exact answers":
        return report.reference_exact_match
    if title != "score":
        return None
    return next((evaluation.reference_score.value for evaluation in evaluations if evaluation.reference_score), None)


def _throughput(report: DeployReport) -> Plot | None:
    panels = {"prompt": "prompt_processing_throughput_tps", "new tokens": "token_generation_throughput_tps"}
    measured = [variant for variant in report.variants if all(name in variant.metrics for name in panels.values())]
    if not measured:
        return None
    figure, both = _canvas(2, height=0.9 + 0.35 * len(measured))
    described = []
    for axes, (title, metric) in zip(both, panels.items(), strict=True):
        for place, variant in enumerate(measured):
            value = variant.metrics[metric]
            axes.barh(place, value, color=_styles(report)[variant.precision][0], height=0.65)
            slowest, fastest = _range(variant, metric)
            axes.hlines(place, slowest, fastest, color=_INK, linewidth=1.2)
            axes.annotate(decimal(value), (max(value, fastest), place), (3, 0), textcoords="offset points", va="center")
            described.append(f"{variant.precision} {title} {decimal(value)} tok/s")
        axes.set_yticks(range(len(measured)), [variant.precision for variant in measured] if axes is both[0] else [])
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=3)  # as many as fit with six digits each
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel(f"{title}, tok/s")
        axes.grid(visible=False, axis="y")
    return _plot("throughput", f"Throughput: {'; '.join(described)}.", figure)


def _range(variant: VariantReport, metric: str) -> tuple[float, float]:
    """Return the slowest and the fastest request at the prompt length of the medians."""
    measured = variant.details.measurement
    if measured is None:
        return variant.metrics[metric], variant.metrics[metric]
    prompt_tokens = measured.by_prompt_length[0].prompt_tokens
    found = [float(getattr(row, metric)) for row in measured.rows if row.prompt_tokens == prompt_tokens]
    return min(found), max(found)


def _latency(report: DeployReport) -> Plot | None:
    swept = [
        (variant.precision, variant.details.length_sweep.lengths)
        for variant in report.variants
        if variant.details.length_sweep
    ]
    swept = [(precision, lengths) for precision, lengths in swept if len(lengths) > 1]
    if not swept:
        return None
    figure, (axes,) = _canvas()
    for precision, lengths in swept:
        colour, marker = _styles(report)[precision]
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 5,
            "linewidth": 1.5,
            "label": precision,
        }
        axes.plot([length.prompt_tokens for length in lengths], [length.ttft_ms for length in lengths], **style)
        invalid = [length for length in lengths if not length.valid]
        cross: dict[str, Any] = {"color": _INK, "markersize": 9, "markeredgewidth": 1.5, "linestyle": "none"}
        axes.plot([length.prompt_tokens for length in invalid], [length.ttft_ms for length in invalid], "x", **cross)
    first, last = swept[0][1][0], swept[0][1][-1]
    proportional = first.ttft_ms * last.prompt_tokens / first.prompt_tokens
    axes.plot(
        [first.prompt_tokens, last.prompt_tokens],
        [first.ttft_ms, proportional],
        color=_GRID,
        linewidth=1,
        linestyle=(0, (4, 3)),
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(_plain_between_decades())
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("time to first token, ms")
    axes.legend(frameon=False, labelcolor=_INK)
    described = "; ".join(
        f"{precision} {decimal(lengths[0].ttft_ms)} ms at {lengths[0].prompt_tokens:,} tokens, "
        f"{decimal(lengths[-1].ttft_ms)} ms at {lengths[-1].prompt_tokens:,}"
        for precision, lengths in swept
    )
    return _plot("latency", f"Time to the first token: {described}.", figure)


def _memory(report: DeployReport) -> Plot | None:
    soaks = [
        (variant.precision, endurance.runtime, endurance.memory)
        for variant in report.variants
        for endurance in variant.details.endurance
        if endurance.memory and len(endurance.memory.rss_bytes) > 1
    ]
    if len({precision for precision, _, _ in soaks}) > MAX_SOAKED:
        soaks = [soak for soak in soaks if soak[0] == report.selected]
    if not soaks:
        return None
    figure, (axes,) = _canvas()
    described = []
    for precision, runtime, memory in soaks:
        grown = [(size - memory.rss_bytes[0]) / 1e6 for size in memory.rss_bytes]
        style = "-" if runtime == "genai" else (0, (2, 1.5))
        label = f"{precision}, {'genai' if runtime == 'genai' else 'Foundry'}"
        colour = _styles(report)[precision][0]
        axes.plot(range(1, len(grown) + 1), grown, color=colour, linestyle=style, linewidth=1.3, label=label)
        described.append(f"{label} {grown[-1]:+,.1f} MB after {len(grown):,} requests")
    axes.axvline(soaks[0][2].warmup_requests + 0.5, color=_GRID, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("requests (dashed: end of the warm-up)")
    axes.set_ylabel("growth of memory, MB")
    columns = 2 if len(soaks) > 3 else 1
    axes.legend(frameon=False, labelcolor=_INK, ncols=columns, fontsize=7.5)
    return _plot("memory", f"Growth of resident memory: {'; '.join(described)}.", figure)


def draw_losses(losses: "Sequence[Loss]") -> Plot:
    """Draw a fine-tuning's losses over its steps, in nats per token."""
    figure, (axes,) = _canvas()
    described = []
    for index, (title, attribute) in enumerate((("training", "train_loss"), ("held out", "held_out_loss"))):
        points = [(loss.step, getattr(loss, attribute)) for loss in losses if getattr(loss, attribute) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            marker = MARKERS[index] if len(points) < 20 else None
            axes.plot(steps, values, color=COLOURS[index], marker=marker, markersize=4, linewidth=1.2, label=title)
            described.append(f"{title} from {decimal(values[0])} to {decimal(values[-1])}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=7.5)
    return _plot("losses", f"Loss in nats per token: {'; '.join(described)}.", figure)


def _canvas(panels: int = 1, *, height: float = HEIGHT_IN) -> "tuple[Figure, list[Axes]]":
    # Figure instead of pyplot, because pyplot keeps every figure and a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    all_axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GRID)
        axes.grid(visible=True, color=_GRID, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
    return figure, all_axes


def _percent_axis() -> "Formatter":
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, symbol="")


def _plain_between_decades() -> "Formatter":
    """Return the formatter of a short logarithmic axis: numbers such as 0.4 and 300, no powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: Any = None) -> str:
            return f"{x:,g}" if super().__call__(x, pos) else ""

    return Plain(minor_thresholds=(1, 0.4))


def _plot(name: PlotName, alt: str, figure: "Figure") -> Plot:
    import matplotlib
    from matplotlib.text import Text
    from PIL import Image

    for text in figure.findobj(lambda artist: isinstance(artist, Text)):
        text.set_color(_INK)  # type: ignore[attr-defined]
    for axes in figure.axes:
        axes.tick_params(color=_GRID, which="both", labelcolor=_INK, labelsize=8.5)
    # With a fixed hash salt, equal figures give equal files; text stays text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.patch.set_visible(False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    figure.patch.set_visible(True)
    figure.patch.set_facecolor("white")
    raster, image = io.BytesIO(), io.BytesIO()
    figure.savefig(raster, format="png", dpi=PNG_DPI)
    # With a palette, the image has a third of the size: Prefect stores it inside the artifact.
    Image.open(raster).convert("RGB").quantize(PNG_COLOURS).save(image, "png", optimize=True)
    return Plot(name, alt, _inline_svg(drawn.getvalue(), name), image.getvalue())


def _inline_svg(text: str, name: str) -> str:
    """Return an SVG file as an element of a page, with unique ids and the page's text colour."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)', f"{name}-", svg)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font:([^;\"]*)'[^;\"]*", r"font:\1sans-serif", svg)
    return re.sub(r"\n\s*", "\n", svg.replace(_INK, "currentColor")).strip()
