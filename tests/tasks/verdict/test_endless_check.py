"""The checks of answers without an end: thoughts that never end and answers in a loop, judged against the source's."""

from typing import Any

import pytest

from slmops.infra.settings import GateSettings
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.report.answers import domain_answers
from slmops.tasks.report.assemble import variant_intervals, variant_metrics
from slmops.tasks.report.records import VariantDetails
from slmops.tasks.verdict.gate import judge
from slmops.tasks.verdict.thresholds import thresholds_for
from tests.support.reports import full_report
from tests.tasks.verdict.test_gate import evaluation

INT4 = thresholds_for("int4", GateSettings())
DONE = {"text": "A lamp.", "tokens": 5, "ended": True}
ENDLESS = {"text": "A lamp, a lamp, a", "tokens": 99, "ended": False}


def evaluated(source: list[dict[str, Any]], variant: list[dict[str, Any]]) -> Evaluation:
    plain = evaluation().rows[0].model_dump()
    rows = [
        plain | {"id": number} | of_variant | {f"reference_{key}": value for key, value in of_source.items()}
        for number, (of_source, of_variant) in enumerate(zip(source, variant, strict=True))
    ]
    return evaluation(rows=rows)


@pytest.mark.parametrize(
    ("check", "good", "bad", "noted"),
    [
        ("ended_thoughts", {"thoughts": DONE}, {"thoughts": ENDLESS}, "The thoughts of 8 of 8 answers do not end"),
        ("repetition", {}, {"repeats": True}, "8 of 8 answers end in a loop"),
    ],
)
def test_a_variant_fails_for_what_its_source_does_not_do(check: str, good: Any, bad: Any, noted: str) -> None:
    fails = judge(evaluated([good] * 8, [bad] * 8), INT4)
    assert [found.name for found in fails.failed_checks] == [check]
    alike = judge(evaluated([bad] * 8, [bad] * 8), INT4)
    assert alike.passed
    assert any(note.startswith(noted) and "the source checkpoint's do the same" in note for note in alike.notes)
    fewer = judge(evaluated([good] * 8, [bad, *[good] * 7]), INT4)
    assert [(found.passed, found.decided) for found in fewer.checks if found.name == check] == [(True, False)]


def test_answers_without_thoughts_and_loops_get_no_such_checks() -> None:
    names = {check.name for check in judge(evaluation(), INT4).checks}
    assert names.isdisjoint({"ended_thoughts", "repetition"})


def test_without_a_source_loops_are_noted() -> None:
    found = evaluated([{}] * 2, [{"repeats": True}, {}])
    alone = found.model_copy(update={"vocabulary": found.vocabulary.model_copy(update={"reference": None})})
    assert "1 of 2 answers end in a loop at their limit of tokens." in judge(alone, INT4).notes


def test_the_report_has_the_figures_of_thoughts() -> None:
    found = evaluated([{"thoughts": DONE}] * 4, [{"thoughts": DONE}] * 3 + [{"thoughts": ENDLESS}])
    report = full_report()
    variants = tuple(
        variant.model_copy(update={"details": VariantDetails(evaluation=found)}) for variant in report.variants[:1]
    )
    shown = str(list(domain_answers(report.model_copy(update={"variants": variants}))))
    assert "Thoughts" in shown
    assert "75" in shown
    assert "28" in shown  # (3 * 5 + 99) / 4 tokens, rounded to even
    details = VariantDetails(evaluation=found)
    metrics = variant_metrics(details)
    assert (metrics["thinking"], metrics["ended_thoughts"], metrics["thought_tokens"]) == (1.0, 0.75, 28.5)
    assert variant_intervals(details)["ended_thoughts"].low < 0.75
