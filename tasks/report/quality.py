"""The report's part on quality: the five checks of the quality list, distributions and template parity."""

import json
from collections.abc import Callable, Iterator, Sequence

from slmops.tasks.exams.answers import EvaluatedRow, Evaluation
from slmops.tasks.exams.endurance import EdgeInputOutcome, Exercise
from slmops.tasks.exams.estimates import Estimate
from slmops.tasks.exams.template_parity import ParityMismatch
from slmops.tasks.exams.text import TextComparison
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.report.blocks import (
    MAX_CHARACTERS,
    Block,
    Comparison,
    Details,
    Heading,
    Paragraph,
    Strong,
    Text,
    bullets,
    joined,
    quoted,
    sentences,
    table,
    visible,
)
from slmops.tasks.report.records import DeployReport, VariantReport
from slmops.tasks.report.wording import (
    INTERVALS,
    NOTHING,
    bytes_per_request,
    check_threshold,
    check_value,
    check_verdict,
    decimal,
    estimated,
    factor,
    percent,
    ratio,
    told,
)
from slmops.tasks.verdict.gate import GateCheck

# Microsoft's tutorial lists these five, and the gate's checks that answer each.
QUALITY_LIST = {
    "Domain answers": ("quality_loss", "non_empty_answers"),
    "Output format": ("output_format",),
    "Memory in long use": ("memory_growth_genai", "memory_growth_foundry"),
    "Steadiness over prompt lengths": ("valid_lengths", "steadiness"),
    "Edge input": ("edge_input_genai", "edge_input_foundry"),
}
FURTHER = {
    "Distributions": ("vocabulary", "finite_logits", "top1_agreement", "kl_divergence"),
    "On the text": ("text_top1_agreement", "text_kl_divergence"),
    "Template parity": ("template_parity",),
}
SIDE_BY_SIDE = 4  # variants that a table has columns for
EXAMPLES = 3  # of each kind and variant
RUNTIMES = {"genai": "genai", "foundry": "Foundry"}

Variants = Sequence[VariantReport]


def quality_blocks(report: DeployReport) -> Iterator[Block]:
    """Yield what the checks found; a section whose figures are missing is left out."""
    sections = [
        _domain_answers(report),
        _output_format(report),
        _memory(report.variants),
        _steadiness(report.variants),
        _edge_input(report.variants, report.selected),
    ]
    found = [list(section) for section in sections]
    if any(found) or any(one.gate for one in report.variants):
        yield Heading("Quality")
        yield from _summary(report)
    for title, blocks in zip(QUALITY_LIST, found, strict=True):
        if blocks:
            yield Heading(title, level=3)
            yield from blocks
    yield from _distributions(report.variants)
    yield from _parity(report.variants)


def _summary(report: DeployReport) -> Iterator[Block]:
    scored = any(one.details.evaluation and one.details.evaluation.score for one in report.variants)
    if report.reference_exact_match is not None and not scored:
        share = percent(report.reference_exact_match)
        yield Paragraph(f"The reference, the checkpoint itself, answers {share} of the evaluation set exactly.")
    judged = [one for one in report.variants if one.gate]
    for start in range(0, len(judged), SIDE_BY_SIDE):
        group = judged[start : start + SIDE_BY_SIDE]
        rows: list[Sequence[Text]] = []
        for title, names in {**QUALITY_LIST, **FURTHER}.items():
            verdicts = [_verdict([check for check in _checks(one) if check.name in names]) for one in group]
            if any(verdict != NOTHING for verdict in verdicts):
                rows.append((title, *verdicts))
        yield from table(("check", *(one.precision for one in group)), rows)
    folded: list[Block] = []
    for one in judged:
        checks = [
            (
                check.name.replace("_", " "),
                _loud(check, check_value(check)),
                check_threshold(check),
                _loud(check, check_verdict(check)),
            )
            for check in _checks(one)
        ]
        folded += _of_variant(one, table(("check", "found", "asked", "verdict"), checks))
    if folded:
        yield Details("Every check with its threshold", folded)


def _of_variant(variant: VariantReport, blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield blocks under the variant's name; nothing without blocks."""
    for index, block in enumerate(blocks):
        if index == 0:
            yield Paragraph((Strong(variant.precision), ":"))
        yield block


def _checks(variant: VariantReport) -> Sequence[GateCheck]:
    return variant.gate.checks if variant.gate else ()


def _verdict(checks: Sequence[GateCheck]) -> Text:
    """Return the gravest verdict of some checks."""
    verdicts = {check_verdict(check) for check in checks}
    gravest = next((one for one in ("failed", "not decided", "passed") if one in verdicts), NOTHING)
    return Strong(gravest) if gravest == "failed" else gravest


def _loud(check: GateCheck, text: str) -> Text:
    return text if check.passed else Strong(text)


def _threshold(variant: VariantReport, *names: str) -> str:
    return next((check_threshold(check) for check in _checks(variant) if check.name in names), NOTHING)


def _evaluations(variants: Variants) -> list[tuple[VariantReport, Evaluation]]:
    return [(one, one.details.evaluation) for one in variants if one.details.evaluation]


def _domain_answers(report: DeployReport) -> Iterator[Block]:
    scored = [(one, evaluated) for one, evaluated in _evaluations(report.variants) if evaluated.score]
    if scored:
        count = len(scored[0][1].rows)
        reference = next((evaluated.reference_score for _, evaluated in scored if evaluated.reference_score), None)
        beside = f"; the reference scores {estimated(reference, percent)}" if reference else ""
        yield Paragraph(f"Mean score of {count:,} answers{beside}. {INTERVALS} A loss fails beyond its interval only.")
    rows = [
        (
            Strong(one.precision),
            estimated(evaluated.score, percent),
            estimated(evaluated.quality_loss, percent),
            _threshold(one, "quality_loss"),
        )
        for one, evaluated in scored
    ]
    yield from table(("variant", "score", "loss", "asked"), rows)
    folded: list[Block] = []
    for one, evaluated in _evaluations(report.variants):
        categories = [
            (quoted(part.category, 60), f"{part.rows:,}", estimated(part.score, percent), _reference_score(part))
            for part in evaluated.categories
        ]
        folded += _of_variant(one, table(("category", "rows", "score", "reference"), categories))
    if folded:
        yield Details("Scores by category", folded)
    yield from _worst_examples(report)


def _worst_examples(report: DeployReport) -> Iterator[Block]:
    asked = {row.id: row for row in report.evaluation_rows}
    folded: list[Block] = []
    for one, evaluated in _evaluations(report.variants):
        answers = {row.id: row for row in evaluated.rows}
        worst = [answers[key] for key in evaluated.worst_examples if key in answers][:EXAMPLES]
        examples: list[Block] = [_example(one.precision, row, asked.get(row.id)) for row in worst]
        if examples and one.precision == report.selected:
            yield Heading(f"Where the reference is right and {one.precision} is wrong", level=4)
            yield from examples
        else:
            folded += examples
    if folded:
        yield Details("Where the reference is right and another variant is wrong", folded)


def _reference_score(part: object) -> str:
    score: Estimate | None = getattr(part, "reference_score", None)
    return NOTHING if score is None else percent(score.value)


def _example(precision: str, row: EvaluatedRow, asked: EvaluationRow | None) -> Comparison:
    lines: list[tuple[str, str]] = []
    if asked is not None:
        lines.append(("asked", visible(asked.messages[-1].content)))
        if asked.expected is not None:
            lines.append(("expected", visible(str(asked.expected))))
    if row.reference_answer is not None:
        lines.append(("reference", visible(row.reference_answer) or "(empty)"))
    lines.append((precision, visible(row.answer) or "(empty)"))
    of_category: Text = (", ", quoted(row.category, 60)) if row.category else ""
    return Comparison(joined([("Row ", quoted(str(row.id), 60)), of_category], ""), lines)


def _output_format(report: DeployReport) -> Iterator[Block]:
    checked = [(one, evaluated) for one, evaluated in _evaluations(report.variants) if evaluated.output_conformity]
    rows = [
        (
            Strong(one.precision),
            estimated(evaluated.output_conformity, percent),
            NOTHING if (beside := evaluated.reference_output_conformity) is None else percent(beside.value),
            _threshold(one, "output_format"),
        )
        for one, evaluated in checked
    ]
    if rows:
        yield Paragraph(f"Share of raw answers in the format that was asked for. {INTERVALS}")
    yield from table(("variant", "in format", "reference", "asked"), rows)
    for one, evaluated in checked:
        faulty = [row for row in evaluated.rows if row.output_fault]
        examples: list[Block] = [
            Comparison(
                ("Row ", quoted(str(row.id), 60)),
                [("answer", visible(row.answer) or "(empty)"), ("fault", visible(row.output_fault or ""))],
            )
            for row in faulty[:EXAMPLES]
        ]
        if examples:
            yield Details(f"{len(faulty):,} of {len(evaluated.rows):,} answers of {one.precision} out of it", examples)


def _exercises(variants: Variants) -> list[tuple[VariantReport, Exercise]]:
    return [(one, exercise) for one in variants for exercise in one.details.exercises]


def _memory(variants: Variants) -> Iterator[Block]:
    rows: list[Sequence[Text]] = []
    for one, exercise in _exercises(variants):
        grown = exercise.memory
        found = "did not end" if grown is None else estimated(grown.bytes_per_request, bytes_per_request)
        requests = NOTHING if grown is None else f"{len(grown.rss_bytes):,}"
        name = f"{one.precision}, {RUNTIMES[exercise.runtime]}"
        rows.append((name, requests, found, _threshold(one, f"memory_growth_{exercise.runtime}")))
    if rows:
        yield Paragraph(f"Growth of the resident memory per request, behind the warm-up. {INTERVALS}")
    yield from table(("variant, runtime", "requests", "growth", "asked"), rows)


def _steadiness(variants: Variants) -> Iterator[Block]:
    swept = [
        (one, one.details.steadiness) for one in variants if one.details.steadiness and one.details.steadiness.lengths
    ]
    rows: list[Sequence[Text]] = []
    for one, sweep in swept:
        cliff = told(sweep.worst_cliff_ratio, factor)
        if sweep.worst_cliff_prompt_tokens is not None:
            cliff += f" at {sweep.worst_cliff_prompt_tokens:,}"
        valid = f"{sum(length.valid for length in sweep.lengths)} of {len(sweep.lengths)}"
        exponent = estimated(sweep.ttft_scaling_exponent, lambda value: f"{value:.2f}")
        rows.append((Strong(one.precision), exponent, cliff, valid))
    if rows:
        limits = {_threshold(one, "steadiness") for one, _ in swept} - {NOTHING}
        asked = f" ({', '.join(sorted(limits))} is asked)" if limits else ""
        yield Paragraph(
            "Exponent: time to the first token grows as the prompt's length to this power. Drop: the largest loss of "
            f"throughput from one length to the next, and the prompt tokens where it is{asked}."
        )
    yield from table(("variant", "exponent", "drop", "valid"), rows)
    folded: list[Block] = []
    for one, sweep in swept:
        figures = [
            (
                f"{length.prompt_tokens:,}",
                decimal(length.ttft_ms),
                decimal(length.token_generation_throughput_tps),
                "yes" if length.valid else Strong("no"),
            )
            for length in sweep.lengths
        ]
        folded += _of_variant(one, table(("prompt tokens", "TTFT, ms", "new tok/s", "valid"), figures))
    if folded:
        yield Details("Every prompt length", folded)
    yield from _notes([(one.precision, note) for one, sweep in swept for note in sweep.notes])


def _edge_input(variants: Variants, selected: str | None) -> Iterator[Block]:
    rows: list[Sequence[Text]] = []
    faults: list[Text] = []
    reaching: dict[str, list[str]] = {}
    folded: list[Block] = []
    for one, exercise in _exercises(variants):
        name = f"{one.precision}, {RUNTIMES[exercise.runtime]}"
        outcomes = exercise.edge_inputs
        if not outcomes:
            continue
        counts = [str(sum(one.outcome == outcome for one in outcomes)) for outcome in ("answered", "refused")]
        bad = [outcome for outcome in outcomes if not outcome.handled]
        rows.append((name, *counts, Strong(str(len(bad))) if bad else "0"))
        faults += [joined([f"{name}: ", _outcome(outcome)], "") for outcome in bad]
        if any(outcome.control_tokens for outcome in outcomes):
            reaching.setdefault(RUNTIMES[exercise.runtime], []).append(one.precision)
        # The variants end alike as a rule: one of them tells.
        if bad or one.precision == selected or selected is None:
            folded.append(Paragraph((Strong(name), ":")))
            folded += bullets([_outcome(outcome) for outcome in outcomes])
    if rows:
        yield Paragraph("Each difficult input must end in an answer or a clean error, and leave the runtime working.")
    yield from table(("variant, runtime", "answered", "refused", "bad"), rows)
    yield from bullets(faults)
    for runtime, precisions in reaching.items():
        yield Paragraph(
            f"Control tokens that a user types reach the model as such in {runtime} ({', '.join(precisions)})."
        )
    yield from _notes(
        [
            (f"{one.precision} in {RUNTIMES[exercise.runtime]}", note)
            for one, exercise in _exercises(variants)
            for note in exercise.notes
        ]
    )
    if folded:
        yield Details("What became of each input", folded)


def _notes(told: Sequence[tuple[str, str]]) -> Iterator[Block]:
    """Yield each note once, with those of whom it is told."""
    subjects: dict[str, list[str]] = {}
    for subject, note in told:
        subjects.setdefault(note, []).append(subject)
    yield from bullets([f"{sentences(note)} ({', '.join(of)})" for note, of in subjects.items()])


def _outcome(outcome: EdgeInputOutcome) -> Text:
    ended = outcome.outcome if outcome.alive else f"{outcome.outcome}, and the runtime did not work afterwards"
    shown: Text = (": ", quoted(outcome.detail, 80)) if outcome.detail else ""
    return joined([(quoted(outcome.name, 60), f" {ended}"), shown], "")


def _distributions(variants: Variants) -> Iterator[Block]:
    rows = [
        (
            Strong(one.precision),
            _agreement(evaluated.top1_agreement_interval, evaluated.top1_agreement),
            _divergence(evaluated.kl_divergence_interval, evaluated.kl_divergence, evaluated.kl_divergence_p99),
            _perplexity_ratio(evaluated),
        )
        for one, evaluated in _evaluations(variants)
        if evaluated.top1_agreement is not None or evaluated.kl_divergence is not None
    ]
    texts = [(one, one.details.text) for one in variants if one.details.text]
    if not rows and not texts:
        return
    yield Heading("Distance from the checkpoint", level=3)
    yield Paragraph(
        "First choice: share of tokens at which variant and checkpoint prefer the same next token. KL divergence: mean "
        "over tokens and 99th percentile, in nats. Perplexity: the variant's over the checkpoint's; 1 is alike. "
        f"{INTERVALS}"
    )
    columns = ("variant", "first choice", "KL divergence", "perplexity")
    yield from table(columns, rows)
    if texts:
        text = texts[0][1]
        yield Paragraph(("On ", quoted(text.origin, 120), f" ({text.tokens:,} tokens):"))
        yield from table(columns, [(Strong(one.precision), *_text_figures(found)) for one, found in texts])


def _agreement(interval: Estimate | None, value: float | None) -> str:
    return estimated(interval, percent) if interval else told(value, percent)


def _divergence(interval: Estimate | None, value: float | None, p99: float | None) -> str:
    mean = estimated(interval, ratio) if interval else told(value, ratio)
    return mean if p99 is None else f"{mean}, p99 {ratio(p99)}"


def _perplexity_ratio(evaluated: Evaluation) -> str:
    if not evaluated.perplexity or not evaluated.reference_perplexity:
        return NOTHING
    return f"{evaluated.perplexity / evaluated.reference_perplexity:.4f}"


def _text_figures(text: TextComparison) -> tuple[str, str, str]:
    four: Callable[[float], str] = "{:.4f}".format
    alone = told(text.perplexity, lambda value: f"{value:.2f} (no reference)")
    return (
        _agreement(text.top1_agreement, None),
        _divergence(text.kl_divergence, None, text.kl_divergence_p99),
        estimated(text.perplexity_ratio, four) if text.perplexity_ratio else alone,
    )


def _parity(variants: Variants) -> Iterator[Block]:
    blocks: list[Block] = []
    agreeing = [one for one in variants if one.details.parity and one.details.parity.holds]
    if agreeing:
        count = agreeing[0].details.parity.conversations if agreeing[0].details.parity else 0
        names = ", ".join(one.precision for one in agreeing)
        blocks.append(
            Paragraph(f"Transformers, genai and Foundry Local read {count} conversations as the same tokens: {names}.")
        )
    for one in variants:
        blocks += _parity_faults(one)
    notes = dict.fromkeys(note for one in variants if one.details.parity for note in one.details.parity.notes)
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
    """Return both renderings as JSON strings from a little before where they part."""
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
