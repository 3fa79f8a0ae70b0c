"""The report's parts on answers: scores, output format, and the distance from the checkpoint."""

from collections.abc import Callable, Iterator

from slmops.infra.reference.answers import Thoughts
from slmops.tasks.exams.estimates import Estimate
from slmops.tasks.exams.evaluation import EvaluatedRow, Evaluation
from slmops.tasks.exams.text import TextComparison
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.questions.tools import shown_calls
from slmops.tasks.report.blocks import (
    Block,
    Comparison,
    Details,
    Heading,
    Paragraph,
    Strong,
    Text,
    joined,
    quoted,
    table,
    visible,
)
from slmops.tasks.report.per_variant import EXAMPLES, Variants, evaluations, side_by_side, threshold_of
from slmops.tasks.report.records import DeployReport
from slmops.tasks.report.wording import INTERVALS, NOTHING, estimated, percent, ratio, shown
from slmops.tasks.verdict.endless_check import ThoughtFigures, thought_figures
from slmops.tasks.verdict.tool_check import FAULTS, fault_shares, right_arguments, right_functions, right_silence


def domain_answers(report: DeployReport) -> Iterator[Block]:
    """Yield the scores, the scores by category, and examples of wrong answers."""
    scored = [(variant, evaluated) for variant, evaluated in evaluations(report.variants) if evaluated.score]
    if scored:
        count = len(scored[0][1].rows)
        reference = next((evaluated.reference_score for _, evaluated in scored if evaluated.reference_score), None)
        beside = f"; the reference scores {estimated(reference, percent)}" if reference else ""
        yield Paragraph(f"Mean score of {count:,} answers{beside}. {INTERVALS} A loss fails beyond its interval only.")
    rows = [
        (
            Strong(variant.precision),
            estimated(evaluated.score, percent),
            estimated(evaluated.quality_loss, percent),
            threshold_of(variant, "quality_loss"),
        )
        for variant, evaluated in scored
    ]
    yield from table(("variant", "score", "loss", "asked"), rows)
    if by_category := list(side_by_side("category", _category_scores(report))):
        yield Details("Scores by category", by_category)
    yield from _modes(report)
    yield from _thoughts(report)
    yield from _tool_calls(report)
    yield from _worst_examples(report)


def _modes(report: DeployReport) -> Iterator[Block]:
    """Yield the figures of answers with thoughts and of those without, if the rows were asked in both modes."""
    rows: list[tuple[Text, ...]] = []
    for variant, evaluated in evaluations(report.variants):
        for thinks, found in evaluated.modes.items():
            rows.append(
                (
                    Strong(variant.precision),
                    "on" if thinks else "off",
                    f"{len(found.rows):,}",
                    estimated(found.reference_score, percent),
                    estimated(found.score, percent),
                    estimated(found.quality_loss, percent),
                    shown(found.top1_agreement, percent),
                    shown(found.kl_divergence, ratio),
                )
            )
    if rows:
        yield Heading("With and without thoughts", level=4)
        yield Paragraph(f"The gate judges both: a variant may have lost only one. {INTERVALS}")
    columns = ("variant", "thoughts", "rows", "reference", "score", "loss", "same token", "KL divergence")
    yield from table(columns, rows)


def _thoughts(report: DeployReport) -> Iterator[Block]:
    """Yield how many answers think, how many of these end their thoughts, and how long thoughts are."""
    rows: list[tuple[Text, ...]] = []
    for variant, evaluated in evaluations(report.variants):
        found = thought_figures(evaluated, of_source=False)
        beside = thought_figures(evaluated, of_source=True)
        if not rows and beside:
            rows.append(("reference", *_thought_cells(beside)))
        if found or beside:
            rows.append((Strong(variant.precision), *_thought_cells(found)))
    if rows:
        yield Heading("Thoughts", level=4)
        yield Paragraph(
            "Answers are scored without their thoughts. Shares of the answers that think, and of these whose thoughts "
            f"end within their limit; mean length of thoughts, in tokens. {INTERVALS}"
        )
    yield from table(("variant", "think", "end", "tokens"), rows)


def _thought_cells(figures: ThoughtFigures | None) -> tuple[str, str, str]:
    if figures is None:
        return (NOTHING, NOTHING, NOTHING)
    return (estimated(figures.thinking, percent), estimated(figures.ended, percent), f"{figures.tokens:,.0f}")


def _tool_calls(report: DeployReport) -> Iterator[Block]:
    """Yield what was right of the calls of tools, and the faults that the source checkpoint does not have."""
    rows: list[tuple[Text, ...]] = []
    for variant, evaluated in evaluations(report.variants):
        made = [row.calls for row in evaluated.rows if row.calls]
        shares, faults = (right_functions(made), right_arguments(made), right_silence(made)), fault_shares(evaluated)
        figures = [NOTHING if share is None else estimated(share, percent) for share in shares]
        added = [estimated(faults[name], percent) if name in faults else NOTHING for name in FAULTS]
        rows += [(Strong(variant.precision), *figures, *added)] if made else []
    if rows:
        yield Heading("Calls of tools", level=4)
        yield Paragraph(
            "Shares of rows: the right functions, their right arguments, and no call where none is due. Then how many "
            f"more rows than with the reference lose a call, invent one, or change an argument. {INTERVALS}"
        )
    yield from table(("variant", "functions", "arguments", "no call", "lost", "invented", "changed"), rows)


def _worst_examples(report: DeployReport) -> Iterator[Block]:
    asked = {row.id: row for row in report.evaluation_rows}
    folded: list[Block] = []
    for variant, evaluated in evaluations(report.variants):
        answers = {row.id: row for row in evaluated.rows}
        worst = [answers[key] for key in evaluated.worst_examples if key in answers][:EXAMPLES]
        examples: list[Block] = [_example(variant.precision, row, asked.get(row.id)) for row in worst]
        if examples and variant.precision == report.selected:
            yield Heading(f"Where the reference is right and {variant.precision} is wrong", level=4)
            yield from examples
        else:
            folded += examples
    if folded:
        yield Details("Where the reference is right and another variant is wrong", folded)


def _category_scores(report: DeployReport) -> dict[str, dict[Text, Text]]:
    """Return the scores by variant and category, which is named with its rows and the source checkpoint's score."""
    found: dict[str, dict[Text, Text]] = {}
    for variant, evaluated in evaluations(report.variants):
        for part in evaluated.categories:
            reference = f"; reference {percent(part.reference_score.value)}" if part.reference_score else ""
            name = (quoted(part.category, 60), f" ({part.rows:,} rows{reference})")
            found.setdefault(variant.precision, {})[name] = estimated(part.score, percent)
    return found


def _example(precision: str, row: EvaluatedRow, asked: EvaluationRow | None) -> Comparison:
    lines: list[tuple[str, str]] = []
    if asked is not None:
        lines.append(("asked", visible(asked.messages[-1].content)))
        if asked.expected is not None:
            lines.append(("expected", visible(str(asked.expected))))
        if asked.expected_tool_calls is not None:
            lines.append(("expected", visible(shown_calls(asked.expected_tool_calls))))
    if row.reference_answer is not None:
        lines.append(("reference", _answer(row.reference_answer, row.reference_thoughts)))
    lines.append((precision, _answer(row.answer, row.thoughts)))
    of_category: Text = (", ", quoted(row.category, 60)) if row.category else ""
    return Comparison(joined([("Row ", quoted(str(row.id), 60)), of_category], ""), lines)


def _answer(answer: str, thoughts: Thoughts | None) -> str:
    return visible(answer) or ("(its thoughts do not end)" if thoughts and not thoughts.ended else "(empty)")


def output_format(report: DeployReport) -> Iterator[Block]:
    """Yield the shares of answers in the requested format, and examples of other answers."""
    checked = [
        (variant, evaluated) for variant, evaluated in evaluations(report.variants) if evaluated.output_conformity
    ]
    rows = [
        (
            Strong(variant.precision),
            estimated(evaluated.output_conformity, percent),
            NOTHING if (beside := evaluated.reference_output_conformity) is None else percent(beside.value),
            threshold_of(variant, "output_format"),
        )
        for variant, evaluated in checked
    ]
    if rows:
        yield Paragraph(f"Share of raw answers in the requested format. {INTERVALS}")
    yield from table(("variant", "in format", "reference", "asked"), rows)
    for variant, evaluated in checked:
        faulty = [row for row in evaluated.rows if row.output_fault]
        examples: list[Block] = [
            Comparison(
                ("Row ", quoted(str(row.id), 60)),
                [("answer", visible(row.answer) or "(empty)"), ("fault", visible(row.output_fault or ""))],
            )
            for row in faulty[:EXAMPLES]
        ]
        if examples:
            yield Details(
                f"{len(faulty):,} of {len(evaluated.rows):,} answers of {variant.precision} are not in it", examples
            )
    yield from _constraint(report)


def _constraint(report: DeployReport) -> Iterator[Block]:
    """Yield what the output schema as a grammar changes, and answers whose form hides that they are wrong."""
    constrained = [(variant, found) for variant in report.variants if (found := variant.details.constraint)]
    rows = [
        (
            Strong(variant.precision),
            told,
            estimated(figures.conformity, percent),
            estimated(figures.score, percent),
            estimated(figures.well_formed_but_wrong, percent),
            f"{figures.tokens_per_s:,.0f}",
            f"{figures.start_ms:,.1f} ms",
        )
        for variant, found in constrained
        for told, figures in (("no", found.free), ("yes", found.bound))
    ]
    if rows:
        yield Heading("With the schema as a constraint", level=4)
        yield Paragraph(
            "A grammar leaves only answers of the schema's form; it does not make them right. Answers that are "
            f"well-formed but wrong are found by their content alone. {INTERVALS} Then tokens per second, and the time "
            "before the first, in which a grammar is made."
        )
    columns = ("variant", "constrained", "in format", "score", "well-formed but wrong", "tokens/s", "before")
    yield from table(columns, rows)
    for variant, found in constrained:
        wrong = [row for row in found.rows if row.bound.is_well_formed_but_wrong]
        examples: list[Block] = [
            Comparison(
                ("Row ", quoted(str(row.id), 60)),
                [("constrained", visible(row.bound.answer)), ("free", visible(row.free.answer) or "(empty)")],
            )
            for row in wrong[:EXAMPLES]
        ]
        if examples:
            yield Details(f"{len(wrong):,} constrained answers of {variant.precision} are wrong", examples)


def distributions(variants: Variants) -> Iterator[Block]:
    """Yield the distances of the variants' next-token distributions from the checkpoint's."""
    rows = [
        (
            Strong(variant.precision),
            _agreement(evaluated.top1_agreement_interval, evaluated.top1_agreement),
            _divergence(evaluated.kl_divergence_interval, evaluated.kl_divergence, evaluated.kl_divergence_p99),
            _perplexity_ratio(evaluated),
        )
        for variant, evaluated in evaluations(variants)
        if evaluated.top1_agreement is not None or evaluated.kl_divergence is not None
    ]
    texts = [(variant, variant.details.text) for variant in variants if variant.details.text]
    if not rows and not texts:
        return
    yield Heading("Distance from the checkpoint", level=3)
    yield Paragraph(
        "First choice: share of tokens at which variant and checkpoint prefer the same next token. KL divergence: mean "
        "over tokens and 99th percentile, in nats. Perplexity: the variant's over the checkpoint's; 1 means equal. "
        f"{INTERVALS}"
    )
    columns = ("variant", "first choice", "KL divergence", "perplexity")
    yield from table(columns, rows)
    if texts:
        text = texts[0][1]
        yield Paragraph(("On ", quoted(text.origin, 120), f" ({text.tokens:,} tokens):"))
        yield from table(columns, [(Strong(variant.precision), *_text_figures(found)) for variant, found in texts])


def _agreement(interval: Estimate | None, value: float | None) -> str:
    return estimated(interval, percent) if interval else shown(value, percent)


def _divergence(interval: Estimate | None, value: float | None, p99: float | None) -> str:
    mean = estimated(interval, ratio) if interval else shown(value, ratio)
    return mean if p99 is None else f"{mean}, p99 {ratio(p99)}"


def _perplexity_ratio(evaluated: Evaluation) -> str:
    if not evaluated.perplexity or not evaluated.reference_perplexity:
        return NOTHING
    return f"{evaluated.perplexity / evaluated.reference_perplexity:.4f}"


def _text_figures(text: TextComparison) -> tuple[str, str, str]:
    four: Callable[[float], str] = "{:.4f}".format
    alone = shown(text.perplexity, lambda value: f"{value:.2f} (no reference)")
    return (
        _agreement(text.top1_agreement, None),
        _divergence(text.kl_divergence, None, text.kl_divergence_p99),
        estimated(text.perplexity_ratio, four) if text.perplexity_ratio else alone,
    )
