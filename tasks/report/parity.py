"""The report's part on template parity: where a runtime tokenizes a conversation differently."""

import json
from collections.abc import Iterator

from slmops.tasks.exams.template_parity import ParityMismatch
from slmops.tasks.report.blocks import (
    MAX_CHARACTERS,
    Block,
    Comparison,
    Heading,
    Paragraph,
    Strong,
    Text,
    bullets,
    joined,
    quoted,
    sentences,
    visible,
)
from slmops.tasks.report.per_variant import EXAMPLES, RUNTIMES, Variants
from slmops.tasks.report.records import VariantReport


def template_parity(variants: Variants) -> Iterator[Block]:
    """Yield whether the runtimes tokenize conversations equally, and where they differ."""
    blocks: list[Block] = []
    agreeing = [variant for variant in variants if variant.details.parity and variant.details.parity.holds]
    if agreeing:
        count = agreeing[0].details.parity.conversations if agreeing[0].details.parity else 0
        names = ", ".join(variant.precision for variant in agreeing)
        blocks.append(
            Paragraph(f"Transformers, genai and Foundry Local read {count} conversations as the same tokens: {names}.")
        )
    for variant in variants:
        blocks += _parity_faults(variant)
    notes = dict.fromkeys(
        note for variant in variants if variant.details.parity for note in variant.details.parity.notes
    )
    blocks += bullets([sentences(note) for note in notes])
    if blocks:
        yield Heading("Template parity", level=3)
        yield from blocks


def _parity_faults(variant: VariantReport) -> Iterator[Block]:
    parity = variant.details.parity
    if parity is None:
        evaluated = variant.details.evaluation
        example = evaluated.template_mismatches.example if evaluated else None
        if evaluated and example:
            yield Paragraph(
                f"{variant.precision}: {evaluated.template_mismatches.count} of {len(evaluated.rows)} prompts differ."
            )
            title = ("Row ", quoted(str(example.id), 60))
            yield _two_strings(
                title, example.reference, example.variant, len(example.reference_ids), len(example.variant_ids)
            )
        return
    if parity.mismatches:
        yield Paragraph(
            (Strong(variant.precision), f": {len(parity.mismatches)} of {parity.conversations} conversations differ.")
        )
    for mismatch in parity.mismatches[:EXAMPLES]:
        yield _mismatch(mismatch)
    if parity.broken_control_tokens:
        tokens = joined([quoted(token, 60) for token in parity.broken_control_tokens[:20]])
        yield Paragraph((Strong(variant.precision), ": not one token in every runtime: ", *tokens, "."))


def _mismatch(mismatch: ParityMismatch) -> Comparison:
    title = (f"In {RUNTIMES[mismatch.runtime]}, conversation ", quoted(mismatch.conversation, 60))
    return _two_strings(title, mismatch.expected, mismatch.found, mismatch.expected_tokens, mismatch.found_tokens)


def _two_strings(title: Text, expected: str, found: str, expected_tokens: int, found_tokens: int) -> Comparison:
    """Return both renderings as JSON strings, starting shortly before their first difference."""
    alike = next(
        (at for at, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]),
        min(len(expected), len(found)),
    )
    start = alike - 60 if alike > MAX_CHARACTERS - 60 else 0
    shown = [json.dumps(text[start:], ensure_ascii=False) for text in (expected, found)]
    mark = f" from character {start:,}" if start else ""
    lines = [
        (f"expected{mark}, {expected_tokens:,} tokens", visible(shown[0])),
        (f"found{mark}, {found_tokens:,} tokens", visible(shown[1])),
    ]
    return Comparison(title, lines)
