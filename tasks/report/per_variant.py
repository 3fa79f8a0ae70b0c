"""Shared code of the report's parts on quality: figures and checks by variant."""

from collections.abc import Iterator, Mapping, Sequence

from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.report.blocks import Block, Paragraph, Strong, Text, bullets, sentences, table
from slmops.tasks.report.records import VariantReport
from slmops.tasks.report.wording import NOTHING, check_threshold
from slmops.tasks.verdict.checks import GateCheck

EXAMPLES = 3  # of each kind and variant
RUNTIMES = {"genai": "genai", "foundry": "Foundry"}

Variants = Sequence[VariantReport]


def of_variant(variant: VariantReport, blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield blocks under the variant's name; nothing without blocks."""
    for index, block in enumerate(blocks):
        if index == 0:
            yield Paragraph((Strong(variant.precision), ":"))
        yield block


def side_by_side(title: str, figures: Mapping[str, Mapping[Text, Text]]) -> Iterator[Block]:
    """Yield a table of one kind of figures with a column per variant; `figures` are by variant, then by row."""
    names = list(dict.fromkeys(name for of_variant in figures.values() for name in of_variant))
    rows = [(name, *(of_variant.get(name, NOTHING) for of_variant in figures.values())) for name in names]
    yield from table((title, *figures), rows)


def checks_of(variant: VariantReport) -> Sequence[GateCheck]:
    """Return the gate's checks of a variant; none if it was not judged."""
    return variant.gate.checks if variant.gate else ()


def threshold_of(variant: VariantReport, *names: str) -> str:
    """Return the threshold of the first of some checks."""
    return next((check_threshold(check) for check in checks_of(variant) if check.name in names), NOTHING)


def evaluations(variants: Variants) -> list[tuple[VariantReport, Evaluation]]:
    """Return the variants that were evaluated, each with its evaluation."""
    return [(variant, variant.details.evaluation) for variant in variants if variant.details.evaluation]


def notes_of(notes: Sequence[tuple[str, str]]) -> Iterator[Block]:
    """Yield each note once, with the variants that have it."""
    subjects: dict[str, list[str]] = {}
    for subject, note in notes:
        subjects.setdefault(note, []).append(subject)
    yield from bullets([f"{sentences(note)} ({', '.join(of)})" for note, of in subjects.items()])
