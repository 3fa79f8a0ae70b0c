"""The report's plots in the terminal: small, and of plain characters without colours."""

from typing import Any

from slmops.tasks.report.plots import quality_points
from slmops.tasks.report.records import DeployReport

NARROWEST = 60  # columns
WIDEST = 100
QUALITY_ROWS = 12


def terminal_plots(report: DeployReport, width: int) -> str:
    """Return quality against size and the throughput of new tokens, for a terminal of `width` columns.

    Empty if the terminal is narrower than `NARROWEST` columns, or if fewer than two variants have figures.
    """
    if width < NARROWEST:
        return ""
    columns = min(width, WIDEST)
    return "\n".join(text for text in (_quality(report, columns), _throughput(report, columns)) if text)


def _quality(report: DeployReport, width: int) -> str:
    title, points = quality_points(report)
    if len(points) < 2:
        return ""
    figure = _figure(width, QUALITY_ROWS)
    figure.title(f"{title}, %, over size, MB (up and left is better)")
    sizes = [point.size_mb for point in points]
    right_end = 1.15 * max(sizes)
    for point in points:
        if point.interval:
            ends = (100 * point.interval.low, 100 * point.interval.high)
            figure.draw(figure.segment((point.size_mb, point.size_mb), ends, "│"))
    for point in points:
        figure.draw(figure.text(point.size_mb, 100 * point.quality, "●", alignment="center"))
        name = f"{point.precision}*" if point.precision == report.selected else point.precision
        figure.draw(figure.text(point.size_mb + 3 * right_end / width, 100 * point.quality, name))
    figure.ruler("x").lim(0, right_end)
    drawn = _text(figure)
    return f"{drawn}\n* chosen" if report.selected else drawn


def _throughput(report: DeployReport, width: int) -> str:
    metric = "token_generation_throughput_tps"
    measured = [
        (variant.precision, variant.metrics[metric]) for variant in report.variants if metric in variant.metrics
    ]
    if len(measured) < 2:
        return ""
    # Rows count from the bottom, one per bar.
    names = [f"{precision} {value:,.0f}" for precision, value in reversed(measured)]
    values = [value for _, value in reversed(measured)]
    figure = _figure(width, 2 * len(measured) + 4)
    figure.title("new tokens, tok/s")
    figure.draw(figure.bar(names, values, orientation="horizontal", width=0.4))
    # Without limits it would use those of the last bar; the bars are labelled, so that no tick adds anything.
    figure.ruler("x").lim(0, max(values)).frequency(0)
    return _text(figure)


def _figure(width: int, height: int) -> Any:
    import plotext

    # The library has one figure for the whole process: clear the last plot.
    plotext.terminal.limit(False, False)
    plotext.figure.clear()
    plotext.figure.plot_size(width, height)
    return plotext.figure


def _text(figure: Any) -> str:
    text: str = figure.build().string(colorless=True)
    figure.clear()
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
