"""The progress of a run's stages on standard error: a live table on a terminal, else a line when each stage ends."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slmops.infra.foreign_text import for_terminal

SIGN_OF_LIFE_S = 60.0  # between the lines of one stage in a log
SHORTEST_BASIS_S = 2.0  # of a stage's time that a remaining time is estimated from
SMALLEST_SHARE = 0.05  # of a stage that a remaining time is estimated from
SHORTEST_PACE_S = 2.0  # of a stage from whose time the pace of a run is taken: others were made before
LAST_STEP = 0.99  # above this share, what a stage says is its outcome, such as `built before`
BAR_WIDTH = 16


def clock(seconds: float) -> str:
    """Return a duration as `3:05` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass
class _Stage:
    """A stage that is under way. A stage may have several steps, and its share begins again with each."""

    name: str
    began: float
    step_began: float = field(init=False)
    told: float = field(init=False)
    share: float = 0.0
    what: str = ""

    def __post_init__(self) -> None:
        self.step_began = self.told = self.began

    def remaining_s(self, now: float) -> float | None:
        spent = now - self.step_began
        if self.share < SMALLEST_SHARE or spent < SHORTEST_BASIS_S:
            return None
        return spent * (1 - self.share) / self.share


class StageDisplay:
    """Shows the stages of a run: call it with a stage's name, its share from 0 to 1, and what it does."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._under_way: dict[str, _Stage] = {}
        self._lock = RLock()
        self._planned: Mapping[str, float] = {}
        self._took: dict[str, float] = {}
        self.done: list[str] = []
        self.live: Live | None = None

    def __call__(self, stage: str, share: float, what: str) -> None:
        """Show that a stage is at `share`, doing `what`; it has ended at 1.0, and has failed if `what` says so."""
        now = time.monotonic()
        with self._lock:
            if share >= 1.0:
                self._end(stage, now, failed=what == "failed")
                return
            shown = self._under_way.setdefault(stage, _Stage(stage, now))
            if share < shown.share:
                shown.step_began = now
            shown.share, shown.what = share, what or shown.what
            if not self._console.is_terminal and now - shown.told >= SIGN_OF_LIFE_S:
                shown.told = now
                self._print(f"{stage}: {share:.0%} after {clock(now - shown.began)}, {shown.what}")

    def expect(self, planned: Mapping[str, float]) -> None:
        """Show the time that the whole run is likely to take on; `planned` are the times in s by stage.

        `build int4` is also the plan of `build int4-rtn`.
        """
        with self._lock:
            self._planned = planned

    def remaining_s(self) -> float | None:
        """Return the time in s that the run is likely to take on, or None without a plan.

        It is the plan of the stages to come, times what those that have ended took for each planned second.
        """
        now = time.monotonic()
        with self._lock:
            ended = [name for name in self._planned if self._took.get(name, 0.0) >= SHORTEST_PACE_S]
            planned_s = sum(self._planned[name] for name in ended)
            pace = sum(self._took[name] for name in ended) / planned_s if planned_s else 1.0
            left_s = sum(self._left_s(name, pace, now) for name in self._planned if name not in self._took)
        return left_s if self._planned else None

    def _left_s(self, name: str, pace: float, now: float) -> float:
        planned_s = pace * self._planned[name]
        began = next((shown.began for shown in self._under_way.values() if self._plan_of(shown.name) == name), now)
        return max(planned_s - (now - began), 0.0)

    def _plan_of(self, stage: str) -> str:
        return next((name for name in self._planned if stage == name or stage.startswith(f"{name}-")), stage)

    def say(self, line: str) -> None:
        """Print a line above the table."""
        with self._lock:
            self._print(line)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the table away, for a question to the user."""
        if self.live:
            self.live.stop()
        try:
            yield
        finally:
            if self.live:
                self.live.start()

    def table(self) -> Table:
        """Return the stages under way, with the time that each has taken and is likely to take."""
        now = time.monotonic()
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)  # what the others leave
        with self._lock:
            for shown in self._under_way.values():
                left = shown.remaining_s(now)
                bar = ProgressBar(1.0, shown.share, width=BAR_WIDTH, pulse=not shown.share)
                ends = "" if left is None else f"{clock(left)} left"
                grid.add_row(shown.name, bar, clock(now - shown.began), Text(f"{ends:<10} {for_terminal(shown.what)}"))
            done = f"{len(self.done)} {'stage' if len(self.done) == 1 else 'stages'} done"
            left = self.remaining_s()
            in_all = "" if left is None else f"about {clock(left)} left in all"
            grid.add_row(*(Text(cell, style="dim") for cell in (done, "", clock(now - self._began), in_all)))
        return grid

    def _end(self, stage: str, now: float, *, failed: bool) -> None:
        shown = self._under_way.pop(stage, None)
        if shown is None:
            return
        if not failed:
            self.done.append(stage)
        took = now - shown.began
        planned = self._plan_of(stage)
        self._took[planned] = max(took, self._took.get(planned, 0.0))  # one that is repeated was made before
        spent = clock(took) if took >= 10 else f"{took:.1f} s"
        outcome = f", {shown.what}" if shown.share > LAST_STEP and shown.what and not failed else ""
        self._print(f"{stage}: {'failed after ' if failed else ''}{spent}{outcome}")

    def _print(self, line: str) -> None:
        self._console.print(escape(for_terminal(line)), highlight=False, soft_wrap=not self._console.is_terminal)


@contextmanager
def stage_display() -> Iterator[StageDisplay]:
    """Yield the display of a run's stages."""
    console = Console(file=sys.stderr)
    display = StageDisplay(console)
    if not console.is_terminal:
        yield display
        return
    with Live(get_renderable=display.table, console=console, refresh_per_second=4, transient=True) as display.live:
        yield display
