"""Plots are drawn once for the same figures, and anew for others."""

import json
from pathlib import Path

from slmops.tasks.report.plot_cache import draw_once
from tests.support.reports import full_report


def test_equal_figures_are_drawn_once(tmp_path: Path) -> None:
    first = draw_once(full_report(), tmp_path)
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    assert draw_once(full_report().model_copy(update={"status": "unchanged"}), tmp_path) == first
    assert kept.stat().st_mtime_ns == written


def test_other_figures_are_drawn_again(tmp_path: Path) -> None:
    first = draw_once(full_report(), tmp_path)
    smaller = [variant.model_copy(update={"size_bytes": 1}) for variant in full_report().variants]
    assert draw_once(full_report(*smaller), tmp_path)["quality"] != first["quality"]


def test_unreadable_plots_are_drawn_again(tmp_path: Path) -> None:
    first = draw_once(full_report(), tmp_path)
    (kept,) = tmp_path.iterdir()
    for content in ("", "[]", "{}", json.dumps({"figures": None, "plots": 3})):
        kept.write_text(content)
        assert draw_once(full_report(), tmp_path) == first, content
