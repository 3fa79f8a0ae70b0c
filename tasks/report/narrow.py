"""Blocks for Prefect's page on a phone: 358 pixels, which no long word fits.

Its default UI breaks no word, removes `<wbr>` and styles, and scrolls nothing but listings.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from slmops.tasks.report.blocks import (
    Block,
    Bullets,
    Code,
    Details,
    Listing,
    Paragraph,
    Span,
    Strong,
    Table,
    Text,
    joined,
    spans,
)

# Characters of the longest word that fits a line of text, and a cell of a table with four columns.
LONGEST_WORD = 30
LONGEST_CELL_WORD = 14


def narrowed(blocks: Sequence[Block]) -> list[Block]:
    """Return blocks in which addresses, answers without spaces and tables of long words fit."""
    return [narrow for block in blocks for narrow in _narrow(block)]


def longest_word(narrow: bool) -> int:
    """Return the characters of the longest word that fits the page, or a table's cell there."""
    return LONGEST_CELL_WORD if narrow else LONGEST_WORD


def _narrow(block: Block) -> Iterator[Block]:
    match block:
        case Paragraph():
            for is_long, part in _parts(block.text):
                yield Listing(_text_of(part)) if is_long else Paragraph(part)
        case Bullets():
            yield from _bullets(block.items)
        case Table() if any(_has_long_word(cell) for row in block.rows for cell in row):
            yield from _bullets([_row(block.columns, row) for row in block.rows])
        case Details():
            yield Details(block.summary, narrowed(block.blocks))
        case _:
            yield block


def _bullets(items: Sequence[Text]) -> Iterator[Block]:
    """Yield lists, each followed by the long code of its last item."""
    parts = [part for item in items for part in _parts(item)]
    for is_long, group in groupby(parts, key=lambda part: part[0]):
        texts = [text for _, text in group]
        if is_long:
            yield from (Listing(_text_of(text)) for text in texts)
        else:
            yield Bullets(texts)


def _parts(text: Text) -> list[tuple[bool, Text]]:
    """Return a text's parts in order: those of long code, and those between with more than punctuation."""
    grouped = [(is_long, tuple(group)) for is_long, group in groupby(spans(text), key=_is_long)]
    return [(is_long, part) for is_long, part in grouped if is_long or re.search(r"\w", _text_of(part))]


def _is_long(span: Span) -> bool:
    return isinstance(span, Code) and len(span.text) > LONGEST_WORD and not re.search(r"\s", span.text)


def _row(columns: Sequence[str], cells: Sequence[Text]) -> Text:
    """Return a table's row as text: the cell that names it, then the others after their columns' titles."""
    others = [joined([f"{title} ", cell], "") for title, cell in zip(columns[1:], cells[1:], strict=True)]
    return joined([Strong(_text_of(spans(cells[0]))), ": ", joined(others, "; ")], "")


def _has_long_word(text: Text) -> bool:
    return any(len(word) > LONGEST_CELL_WORD for word in re.split(r"[\s-]", _text_of(spans(text))))


def _text_of(text: Text) -> str:
    return "".join(span if isinstance(span, str) else span.text for span in spans(text))
