"""The report's part on quality: the five checks of the quality list, distributions and template parity."""

from collections.abc import Iterator, Sequence

from slmops.tasks.report.answers import distributions, domain_answers, output_format
from slmops.tasks.report.blocks import Block, Details, Heading, Paragraph, Strong, Text, table
from slmops.tasks.report.parity import template_parity
from slmops.tasks.report.per_variant import checks_of, side_by_side
from slmops.tasks.report.records import DeployReport
from slmops.tasks.report.robustness import edge_input, length_sweep, memory
from slmops.tasks.report.wording import NOTHING, check_threshold, check_value, check_verdict, percent
from slmops.tasks.verdict.checks import GateCheck

# The five checks of Microsoft's tutorial, each with the gate's checks for it.
QUALITY_LIST = {
    "Domain answers": ("quality_loss", "non_empty_answers", "ended_answers", "ended_thoughts", "repetition"),
    "Output format": ("output_format",),
    "Memory in long use": ("memory_growth_genai", "memory_growth_foundry"),
    "Speed over prompt lengths": ("valid_lengths", "steadiness"),
    "Edge input": ("edge_input_genai", "edge_input_foundry"),
}
FURTHER = {
    "Distributions": ("vocabulary", "finite_logits", "top1_agreement", "kl_divergence"),
    "On the text": ("text_top1_agreement", "text_kl_divergence"),
    "Template parity": ("template_parity",),
}
WORST_FIRST = ("failed", "allowed to fail", "not decided", "passed")
SIDE_BY_SIDE = 4  # a table has columns for this many variants


def quality_blocks(report: DeployReport) -> Iterator[Block]:
    """Yield the checks' results, without sections whose figures are missing."""
    sections = [
        domain_answers(report),
        output_format(report),
        memory(report.variants),
        length_sweep(report.variants),
        edge_input(report.variants, report.selected),
    ]
    found = [list(section) for section in sections]
    if any(found) or any(variant.gate for variant in report.variants):
        yield Heading("Quality")
        yield from _summary(report)
    for title, blocks in zip(QUALITY_LIST, found, strict=True):
        if blocks:
            yield Heading(title, level=3)
            yield from blocks
    yield from distributions(report.variants)
    yield from template_parity(report.variants)


def _summary(report: DeployReport) -> Iterator[Block]:
    scored = any(variant.details.evaluation and variant.details.evaluation.score for variant in report.variants)
    if report.reference_exact_match is not None and not scored:
        share = percent(report.reference_exact_match)
        yield Paragraph(f"The reference, the checkpoint itself, answers {share} of the evaluation set exactly.")
    judged = [variant for variant in report.variants if variant.gate]
    for start in range(0, len(judged), SIDE_BY_SIDE):
        group = judged[start : start + SIDE_BY_SIDE]
        rows: list[Sequence[Text]] = []
        for title, names in {**QUALITY_LIST, **FURTHER}.items():
            verdicts = [_verdict([check for check in checks_of(variant) if check.name in names]) for variant in group]
            if any(verdict != NOTHING for verdict in verdicts):
                rows.append((title, *verdicts))
        yield from table(("check", *(variant.precision for variant in group)), rows)
    found: dict[str, dict[Text, Text]]
    found = {variant.precision: {check.title: _found(check) for check in checks_of(variant)} for variant in judged}
    if folded := list(side_by_side("check", found)):
        yield Details("Every check with its threshold", folded)


def _found(check: GateCheck) -> Text:
    """Return a check's figure and threshold, and its verdict unless it passed."""
    verdict = check_verdict(check)
    shown = f"{check_value(check)}, {check_threshold(check)}{'' if verdict == 'passed' else f': {verdict}'}"
    return _loud(check, shown)


def _verdict(checks: Sequence[GateCheck]) -> Text:
    """Return the worst verdict of some checks."""
    verdicts = {check_verdict(check) for check in checks}
    gravest = next((verdict for verdict in WORST_FIRST if verdict in verdicts), NOTHING)
    return Strong(gravest) if gravest in WORST_FIRST[:2] else gravest


def _loud(check: GateCheck, text: str) -> Text:
    return text if check.passed else Strong(text)
