"""The report as Markdown: with plots for Prefect's page, and as a file that is readable as plain text."""

import re
from collections.abc import Mapping, Sequence

from slmops.tasks.report.blocks import (
    Block,
    Bullets,
    Code,
    Comparison,
    Details,
    Figure,
    Heading,
    Link,
    Listing,
    Paragraph,
    Strong,
    Table,
    Text,
    spans,
)
from slmops.tasks.report.document import PROMISED_SHARE_OF_FP32, document, size_share
from slmops.tasks.report.html import blocks_to_html
from slmops.tasks.report.narrow import longest_word, narrowed
from slmops.tasks.report.records import DeployReport, VariantReport
from slmops.tasks.report.wording import decimal, estimated, megabytes, percent

SHOWN_METRICS = {
    "load_ms": "load ms",
    "ttft_ms": "TTFT ms",
    "prompt_processing_throughput_tps": "prompt tok/s",
    "token_generation_throughput_tps": "new tok/s",
    "peak_rss_bytes": "peak RSS",
}
# Characters that are markup in Markdown or HTML anywhere in a line, and those that are markup only at its beginning.
_MARKUP = re.compile(r"([\\`*\[\]<>|~]|&(?=[#\w])|(?<!\w)_|_(?!\w)|!(?=\[))")
_BLOCK_START = re.compile(r"^([#+=-]|\d{1,9}[.)])")


def variant_rows(report: DeployReport) -> list[dict[str, str]]:
    """Return the terminal's and the artifact's table: one row a variant, column title -> text."""
    return [_variant_row(variant, report.parameters) for variant in report.variants]


def _variant_row(variant: VariantReport, parameters: int) -> dict[str, str]:
    row = {"precision": variant.precision, "verdict": variant.status, "size": "-", "of fp32": "-"}
    if variant.size_bytes is not None:
        row["size"] = megabytes(variant.size_bytes)
        share = size_share(variant, parameters)
        promised = PROMISED_SHARE_OF_FP32.get(variant.precision)
        if share:
            row["of fp32"] = share + (f" ({promised})" if promised else "")
    for metric, title in SHOWN_METRICS.items():
        value = variant.metrics.get(metric)
        shown = "-" if value is None else megabytes(value) if metric.endswith("_bytes") else decimal(value)
        row[title] = shown
    for name in ("top1_agreement", "kl_divergence"):
        value = variant.metrics.get(name)
        row[name.replace("_", " ")] = "-" if value is None else f"{value:.4f}"
    row["score"] = estimated(variant.intervals.get("score"), percent)
    row["Foundry id"] = variant.foundry_model_id or "-"
    return row


def to_markdown(report: DeployReport, images: Mapping[str, str] | None = None) -> str:
    """Return the report as Markdown.

    With `images` (a plot's name -> the address of its image), it has plots and folded sections, as both of Prefect's
    UIs show them, and long words may break. Without `images` it is plain text: without plots, and with sections instead
    of folded details.
    """
    return "\n\n".join(_rendered(document(report), images)) + "\n"


def blocks_to_markdown(blocks: Sequence[Block], images: Mapping[str, str] | None = None) -> str:
    """Return blocks as Markdown that is readable as plain text; with `images`, for Prefect's page."""
    return "\n\n".join(_rendered(blocks, images)) + "\n"


def _rendered(blocks: Sequence[Block], images: Mapping[str, str] | None) -> list[str]:
    if images is not None:
        blocks = narrowed(blocks)
    return [text for text in (_block(block, images) for block in blocks) if text]


def _block(block: Block, images: Mapping[str, str] | None) -> str:
    breaks = images is not None
    if breaks and _has_long_code(block):
        return blocks_to_html([block])
    match block:
        case Heading():
            text = f"{'#' * block.level} {escaped(block.text)}"
        case Paragraph():
            text = _line(block.text, breaks)
        case Bullets():
            text = "\n".join(f"- {_line(item, breaks)}" for item in block.items)
        case Table():
            text = _table(block, breaks)
        case Figure():
            text = _figure(block, images or {})
        case Listing():
            text = fenced(block.text, block.language)
        case Comparison():
            width = max(len(label) for label, _ in block.lines)
            lines = "\n".join(f"{label.ljust(width)}  {shown}" for label, shown in block.lines)
            text = f"{_line(block.title, breaks)}:\n\n{fenced(lines, 'text')}"
        case Details():
            text = _details(block, images)
    return text


def _figure(block: Figure, images: Mapping[str, str]) -> str:
    caption = escaped(block.caption)
    return f"![{caption}]({images[block.name]})\n\n{caption}" if block.name in images else ""


def _details(block: Details, images: Mapping[str, str] | None) -> str:
    if images is None:
        return "\n\n".join([f"#### {escaped(block.summary)}", *_rendered(block.blocks, images)])
    return blocks_to_html([block])  # Prefect's older UI puts Markdown behind a fold, not into it


def _has_long_code(block: Block) -> bool:
    """Whether a code span has a word that no browser breaks and that is too long for Prefect's page.

    Markdown cannot say where such a word may break, HTML can.
    """
    match block:
        case Paragraph():
            texts, narrow = [block.text], False
        case Bullets():
            texts, narrow = list(block.items), False
        case Table():
            texts, narrow = [cell for row in block.rows for cell in row], True
        case _:
            return False
    codes = [span.text for text in texts for span in spans(text) if isinstance(span, Code)]
    return any(len(word) > longest_word(narrow) for code in codes for word in re.split(r"[\s-]", code))


def _table(block: Table, breaks: bool) -> str:
    lines = ["| " + " | ".join(escaped(title) for title in block.columns) + " |", "| --- " * len(block.columns) + "|"]
    widest = longest_word(True) if breaks else None
    lines += ["| " + " | ".join(_inline(cell, widest, in_table=True) for cell in row) + " |" for row in block.rows]
    return "\n".join(lines)


def _line(text: Text, breaks: bool) -> str:
    """Return text that begins a line."""
    line = _inline(text, longest_word(False) if breaks else None)
    return _BLOCK_START.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", line)


def _inline(text: Text, widest: int | None, *, in_table: bool = False) -> str:
    parts = []
    for span in spans(text):
        match span:
            case Code():
                parts.append(_code_in_table(span.text) if in_table else code_span(span.text))
            case Strong():
                parts.append(f"**{_breakable(span.text, widest)}**")
            case Link():
                parts.append(f"[{_breakable(span.text, widest)}]({span.address})")
            case str():
                parts.append(_breakable(span, widest))
    return "".join(parts).strip()


def _breakable(text: str, widest: int | None) -> str:
    """Return escaped text that may break within words longer than `widest`, at places that leave nothing in a copy."""
    if widest is None:
        return escaped(text)
    marked = re.sub(rf"\S{{{widest}}}(?=\S)", lambda found: f"{found[0]}\u200b", text.replace("\u200b", ""))
    return escaped(marked).replace("\u200b", "<wbr>")


def escaped(text: str) -> str:
    """Return text that Markdown shows unchanged in a line; runs of white space become one space."""
    if text.isspace():
        return " "
    before = " " if text[:1].isspace() else ""
    after = " " if text[-1:].isspace() else ""
    return before + _MARKUP.sub(r"\\\1", " ".join(text.split())) + after


def code_span(text: str) -> str:
    """Return a code span, without markup inside; its fence is longer than any run of backticks in the text."""
    text = " ".join(text.split("\n"))
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or (text != text.strip() and text.strip()) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _code_in_table(text: str) -> str:
    # Parsers disagree on which pipes in a code span end its cell; a character reference never does.
    if "|" not in text:
        return code_span(text)
    return f"<code>{''.join(char if char.isalnum() or char == ' ' else f'&#{ord(char)};' for char in text)}</code>"


def fenced(text: str, language: str = "") -> str:
    """Return a code block, in which nothing is markup."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"
