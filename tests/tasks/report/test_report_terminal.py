"""The report's plots in the terminal, and where they are printed."""

import io
import sys

import pytest

from slmops.deployments.cli.output import print_plots
from slmops.tasks.report.markdown import to_markdown
from slmops.tasks.report.records import VariantDetails
from slmops.tasks.report.terminal import terminal_plots
from tests.support.reports import full_report, full_variant


@pytest.mark.parametrize("width", [60, 80, 100, 300])
def test_it_fits_the_terminal_and_names_every_variant(width: int) -> None:
    text = terminal_plots(full_report(), width)
    assert max(len(line) for line in text.splitlines()) <= min(width, 100)
    assert len(text.splitlines()) < 30
    for part in ("int4*", "int8", "fp16", "* chosen", "size, MB", "score, %", "new tokens, tok/s", "int4 779"):
        assert part in text
    assert "\x1b" not in text


def test_bars_are_in_proportion() -> None:
    lines = terminal_plots(full_report(), 100).splitlines()
    bars = {line.split()[0]: line.count("█") for line in lines if "┤█" in line}
    assert bars["int4"] > bars["int8"] > bars["fp16"]
    assert bars["fp16"] / bars["int4"] == pytest.approx(420 / 779, abs=0.03)


def test_a_warning_of_several_variants_is_told_once_with_their_names() -> None:
    busy, slow = "The machine was busy.", "It is slow."
    variants = [
        full_variant(precision, warnings=warnings)
        for precision, warnings in (("fp16", (slow, busy)), ("int8", (busy,)), ("int4", (busy, busy)))
    ]
    report = full_report(*variants, warnings=("The store is old.",))
    told = ("The store is old.", f"fp16: {slow}", f"fp16, int8, int4: {busy}")
    assert report.all_warnings == told
    assert to_markdown(report).count(busy) == 1


def test_nothing_is_drawn_without_room_or_a_comparison() -> None:
    assert terminal_plots(full_report(), 59) == ""
    assert terminal_plots(full_report(full_variant("int4")), 80) == ""
    bare = [full_variant(precision, metrics={}, details=VariantDetails()) for precision in ("int8", "int4")]
    assert terminal_plots(full_report(*bare), 80) == ""


class Terminal(io.TextIOWrapper):
    """A terminal of an encoding."""

    def __init__(self, encoding: str, *, is_terminal: bool = True) -> None:
        self.bytes = io.BytesIO()
        self.is_terminal = is_terminal
        super().__init__(self.bytes, encoding)

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(
    ("terminal", "printed"),
    [
        (Terminal("utf-8"), True),
        (Terminal("utf-8", is_terminal=False), False),
        (Terminal("ascii"), False),
    ],
)
def test_plots_are_printed_where_a_terminal_can_show_them(
    terminal: Terminal, printed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "90")
    print_plots(lambda width: terminal_plots(full_report(), width))
    terminal.flush()
    shown = terminal.bytes.getvalue().decode()
    assert ("int4*" in shown) == printed
    assert bool(shown) == printed
