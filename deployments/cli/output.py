"""The command line's output: tables on standard output, progress and errors on standard error, or one JSON document."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill, shorten
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slmops.infra.errors import SlmopsError
from slmops.infra.foreign_text import for_terminal, without_passwords

if TYPE_CHECKING:
    from slmops.tasks.exams.statements import Statement

SHOWN_OF_AN_ANSWER = 500  # characters
PIPED_WIDTH = 200  # columns of a table that no terminal shows
SIDE_BY_SIDE = 4  # an 80-column terminal has room for this many columns of figures


def print_json(document: Mapping[str, object]) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_line(text: str) -> None:
    """Print a line of plain text on standard output."""
    Console(highlight=False, soft_wrap=True).print(_plain(text))


def print_prose(text: str) -> None:
    """Print running text on standard output; on a terminal its lines break between words."""
    print_line(_between_words(text, Console()))


def _between_words(text: str, console: Console) -> str:
    """Return text in lines that fit a terminal. A longer word stays whole, because a copy would have the line end."""
    if not console.is_terminal:
        return text
    lines = (fill(line, console.width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())
    return "\n".join(lines)


def print_fact(name: str, text: str) -> None:
    """Print `name: text`; further lines are indented and cannot look like slmops's own."""
    print_line("\n    ".join(f"{name}: {text}".splitlines()))


def print_answer(question: str | None, model_id: str | None, answer: str | None) -> None:
    """Print a model's answer in one line, so that it cannot look like more lines of slmops's own."""
    shown = shorten(answer or "", SHOWN_OF_AN_ANSWER, placeholder=" ...") or "(nothing)"
    print_line(f"Foundry Local answered {question!r} through {model_id}: {shown}")


def print_note(text: str) -> None:
    """Print a line of plain text on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(_plain(text))


def print_piece(text: str) -> None:
    """Print a piece of a line on standard output at once, such as a part of a model's answer."""
    sys.stdout.write(for_terminal(text))
    sys.stdout.flush()


def sized(size_bytes: float) -> str:
    """Return a size in the largest unit of which there is at least one, such as `812 B`, `4.1 kB` or `2.6 MB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:,.1f} {name}"
    return f"{size_bytes:.0f} B"


def _plain(text: str) -> str:
    # Manifests, notes, evidence and answers come from others: their escape sequences could rewrite the terminal.
    return escape(for_terminal(without_passwords(text)))


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows of the same columns as a table; a few rows too wide for the terminal are printed as columns."""
    if not rows:
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(f"[bold]{_plain(title)}[/bold]")
    if not _fits(rows, console.width) and len(rows) <= SIDE_BY_SIDE:
        first, *others = rows[0]
        rows = [{first: key, **{row[first]: row[key] for row in rows}} for key in others]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in rows[0]:
        table.add_column(_plain(column), overflow="fold")
    for row in rows:
        table.add_row(*(_styled(value) for value in row.values()))
    console.print(table)


def print_statements(statements: Sequence["Statement"]) -> None:
    """Print the facts in a checkpoint's files, if there are any."""
    rows = [
        {"what": said.name, "value": said.value, "read from": said.read_from, "used": said.used} for said in statements
    ]
    if rows:
        print_table("Facts from this checkpoint's files", rows)


def print_plots(draw: Callable[[int], str]) -> None:
    """Print plots of plain characters if standard output is a terminal that can show them.

    `draw` takes the terminal's width in columns and returns the text, empty where it is too narrow.
    """
    if not sys.stdout.isatty():
        return
    text = draw(Console().width)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:  # a terminal of an older code page has no box characters
        return
    if text:
        sys.stdout.write(f"\n{text}\n")


def _fits(rows: Sequence[Mapping[str, str]], width: int) -> bool:
    columns = [max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]]
    return sum(columns) + 2 * len(columns) <= width


def _styled(value: str) -> str:
    colours = {"registered": "green", "unchanged": "green", "ok": "green", "passed": "green"}
    colours |= {"rejected": "yellow", "failed": "red", "missing": "red"}
    colour = colours.get(value)
    return f"[{colour}]{value}[/{colour}]" if colour else _plain(value)


def print_error(error: SlmopsError, *, as_json: bool) -> None:
    """Print what was wrong and what to do."""
    if as_json:
        print_json({"error": {"message": error.message, "what_to_do": error.what_to_do}})
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    said = _between_words(f"error: {error.message}", console).removeprefix("error:")
    console.print(f"[bold red]error:[/bold red]{_plain(said)}")
    if error.what_to_do:
        console.print(_plain(error.what_to_do))
