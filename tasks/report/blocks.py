"""The parts of a report, without any markup; `markdown` and `html` render them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from slmops.infra.foreign_text import spelled

MAX_CHARACTERS = 400  # of an answer, a prompt or an error, so that the report stays a page
MAX_SENTENCES = 800
MAX_ROWS = 24  # of a table or list; the others are only counted


@dataclass(frozen=True)
class Code:
    """Text to type, or foreign text (an answer, a prompt); it is shown unchanged and never interpreted."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Strong:
    """Text that stands out."""

    text: str
    kind: ClassVar[str] = "strong"


@dataclass(frozen=True)
class Link:
    """A link to an address that slmops itself made, never to foreign text."""

    text: str
    address: str
    kind: ClassVar[str] = "link"


Span = str | Code | Strong | Link
Text = Span | tuple[Span, ...]


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the report's own."""

    text: str
    level: int = 2
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: Text
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[Text]
    kind: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row, the others are narrow.

    A phone has room for four columns of figures.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Text]]
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """The place of a plot, by its name in `plots.PlotName`; empty if there is no such plot."""

    name: str
    caption: str
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Listing:
    """Program text."""

    text: str
    language: str = ""
    kind: ClassVar[str] = "listing"


@dataclass(frozen=True)
class Comparison:
    """Foreign texts one above the other, in a monospaced font so that differences are visible; (label, text) each."""

    title: Text
    lines: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "comparison"


@dataclass(frozen=True)
class Details:
    """Details for some readers: folded if the target format can."""

    summary: str
    blocks: "Sequence[Block]"
    kind: ClassVar[str] = "details"


Block = Heading | Paragraph | Bullets | Table | Figure | Listing | Comparison | Details


def spans(text: Text) -> tuple[Span, ...]:
    """Return a text's spans as they are shown: on one line, with control characters escaped."""
    return tuple(_in_one_line(span) for span in (text if isinstance(text, tuple) else (text,)))


def _in_one_line(span: Span) -> Span:
    if not isinstance(span, str):
        return replace(span, text=visible(span.text, len(span.text)))
    return "".join(" " if character.isspace() else spelled(character) for character in span)


def joined(parts: Sequence[Text], separator: str = ", ") -> tuple[Span, ...]:
    """Return texts one after another, with a separator between them."""
    found: list[Span] = []
    for index, part in enumerate(parts):
        found += [separator] if index else []
        found += part if isinstance(part, tuple) else [part]
    return tuple(found)


def visible(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Return foreign text on one line, at most `limit` characters of it.

    Line ends, control characters, characters without a glyph and those that change the writing direction become
    escapes, so that nothing in an answer can hide or rearrange the text around it.
    """
    beyond = len(text) - limit
    shown = "".join(spelled(character) for character in text[:limit])
    return f"{shown}… ({beyond:,} more characters)" if beyond > 0 else shown


def quoted(text: str, limit: int = MAX_CHARACTERS) -> Code:
    """Return foreign text, as `visible` shows it."""
    return Code(visible(text, limit) or "(empty)")


def sentences(text: str) -> str:
    """Return running text, such as a warning, of limited length."""
    return visible(" ".join(text.split()), MAX_SENTENCES)


def first_rows(rows: Sequence[Sequence[Text]], width: int) -> list[Sequence[Text]]:
    """Return the rows that a table shows, with a last row that counts the rest."""
    beyond = len(rows) - MAX_ROWS
    if beyond <= 0:
        return list(rows)
    return [*rows[:MAX_ROWS], (f"{beyond:,} more", *[""] * (width - 1))]


def table(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> Iterator[Table]:
    """Yield a table of the first rows; nothing without rows."""
    if rows:
        yield Table(columns, first_rows(rows, len(columns)))


def bullets(items: Sequence[Text]) -> Iterator[Bullets]:
    """Yield a list of the first items; nothing without items."""
    if items:
        beyond = len(items) - MAX_ROWS
        yield Bullets([*items[:MAX_ROWS], *([f"{beyond:,} more"] if beyond > 0 else [])])
