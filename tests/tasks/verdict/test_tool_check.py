"""The tool check: answers whose calls differ are scored, judged against the source's, and shown."""

from typing import Any

from slmops.infra.settings import GateSettings
from slmops.infra.tool_calls.hermes import FORM
from slmops.tasks.exams.estimates import paired_loss
from slmops.tasks.exams.evaluation import Evaluation, score_evaluation
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.report.answers import domain_answers
from slmops.tasks.report.assemble import variant_intervals, variant_metrics
from slmops.tasks.report.records import VariantDetails
from slmops.tasks.verdict.gate import judge
from slmops.tasks.verdict.thresholds import thresholds_for
from tests.support.reports import full_report
from tests.tasks.verdict.test_gate import evaluation

INT4 = thresholds_for("int4", GateSettings())
TOOL = {"type": "function", "function": {"name": "set_light"}}
HALL = '<tool_call>\n{"name": "set_light", "arguments": {"room": "hall"}}\n</tool_call>'
BATH = HALL.replace("hall", "bath")
TEXT = "I can switch lights."


def rows(count: int) -> list[EvaluationRow]:
    """Two rows in which a call is due for each in which none is."""
    due = [{"name": "set_light", "arguments": {"room": "hall"}}]
    return [
        EvaluationRow.model_validate(
            {
                "id": number,
                "messages": [{"role": "user", "content": "Light!"}],
                "tools": [TOOL],
                "expected_tool_calls": due if number % 3 else [],
            }
        )
        for number in range(count)
    ]


def judged(answers: dict[bool, str], count: int = 90) -> Evaluation:
    """A variant's answers where a call is due and where none is; the source's are right."""
    asked = rows(count)
    template = evaluation().rows[0].model_dump()
    found = [
        {**template, "id": row.id, "answer": answers[bool(row.expected_tool_calls)]}
        | {"reference_answer": HALL if row.expected_tool_calls else TEXT}
        for row in asked
    ]
    return score_evaluation(evaluation(rows=found), asked, None, FORM)


def failed(found: Evaluation) -> set[str]:
    return {check.name for check in judge(found, INT4).failed_checks}


def test_calls_that_are_lost_invented_or_changed_fail_the_gate() -> None:
    assert failed(judged({True: HALL, False: TEXT})) == set()
    assert failed(judged({True: TEXT, False: TEXT})) == {"quality_loss", "tool_calls_lost"}
    assert failed(judged({True: HALL, False: HALL})) == {"quality_loss", "tool_calls_invented"}
    assert failed(judged({True: BATH, False: TEXT})) == {"quality_loss", "tool_arguments_changed"}
    assert failed(judged({True: HALL[:30], False: TEXT})) == {"quality_loss", "tool_calls_lost", "tool_calls_invented"}


def test_a_fault_of_the_source_is_none_of_the_variant_and_few_rows_decide_nothing() -> None:
    same = evaluation(rows=[{**evaluation().rows[0].model_dump(), "answer": TEXT, "reference_answer": TEXT}])
    found = score_evaluation(same, rows(2)[1:], None, FORM)
    (lost,) = [check for check in judge(found, INT4).checks if check.name == "tool_calls_lost"]
    assert (lost.value, lost.passed, lost.decided) == (0, True, False)
    assert found.quality_loss == paired_loss([0.0], [0.0])


def test_rows_without_tools_are_judged_as_before() -> None:
    assert not [check for check in judge(evaluation(), INT4).checks if check.name.startswith("tool_")]


def test_the_report_has_the_figures_and_the_worst_calls_side_by_side() -> None:
    found = judged({True: BATH, False: TEXT})
    report = full_report()
    variants = tuple(
        variant.model_copy(update={"details": VariantDetails(evaluation=found)}) for variant in report.variants[:1]
    )
    changes: dict[str, Any] = {"variants": variants, "evaluation_rows": tuple(rows(90))}
    text = str(list(domain_answers(report.model_copy(update=changes))))
    assert "Calls of tools" in text
    assert 'set_light({"room": "hall"})' in text  # expected
    assert '"room": "bath"' in text
    assert {part.category for part in found.categories} == {"simple", "irrelevance"}


def test_a_deploys_metrics_have_the_shares_of_right_calls_with_intervals() -> None:
    details = VariantDetails(evaluation=judged({True: BATH, False: TEXT}))
    metrics, intervals = variant_metrics(details), variant_intervals(details)
    shares = {"right_functions": 1.0, "right_arguments": 0.0, "right_silence": 1.0}
    assert {name: metrics[name] for name in shares} == shares
    assert all(intervals[name].low < intervals[name].high for name in shares)
    assert not shares.keys() & variant_metrics(VariantDetails(evaluation=evaluation())).keys()
