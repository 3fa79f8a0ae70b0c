"""The gate on a model that was evaluated with thoughts and without: each mode is judged, and shown, apart."""

from typing import Any

from slmops.infra.settings import GateSettings
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.report.answers import domain_answers
from slmops.tasks.report.assemble import variant_intervals
from slmops.tasks.report.blocks import Table
from slmops.tasks.report.records import VariantDetails
from slmops.tasks.verdict.gate import judge
from slmops.tasks.verdict.thresholds import thresholds_for
from tests.support.reports import full_report, full_variant
from tests.tasks.verdict.test_gate import evaluation

INT4 = thresholds_for("int4", GateSettings(max_quality_loss=0.1))
ROWS = 30


def asked_in_both_modes(wrong_at_once: int, **at_once: Any) -> Evaluation:
    """A source that is always right, and a variant that is wrong in some rows without thoughts."""
    plain = evaluation().rows[0].model_dump() | {"reference_score": 1.0}
    rows = [
        plain
        | {"id": f"{thinks} {number}", "enable_thinking": thinks, "score": float(thinks or number >= wrong_at_once)}
        for number in range(ROWS)
        for thinks in (True, False)
    ]
    return evaluation(rows=[row if row["enable_thinking"] else row | at_once for row in rows])


def failed(found: Evaluation) -> list[str]:
    return [check.title for check in judge(found, INT4).failed_checks]


def test_a_loss_in_one_mode_fails_though_both_together_would_pass() -> None:
    found = asked_in_both_modes(wrong_at_once=9)
    assert failed(found) == ["quality loss without thoughts"]
    mixed = [row.model_copy(update={"enable_thinking": None}) for row in found.rows]
    assert not failed(evaluation(rows=mixed))


def test_distributions_of_each_mode_are_those_of_its_rows() -> None:
    distant = asked_in_both_modes(0, kl_divergence=0.9, positions=10, top1_agreement=0.4)
    with_thoughts, without = distant.modes[True], distant.modes[False]
    assert (with_thoughts.kl_divergence, without.kl_divergence) == (0.0, 0.9)
    assert (with_thoughts.positions, without.positions) == (5 * ROWS, 10 * ROWS)
    checks = {check.title: check.value for check in judge(distant, INT4).checks}
    assert (checks["top1 agreement with thoughts"], checks["top1 agreement without thoughts"]) == (1.0, 0.4)


def test_rows_that_leave_it_to_the_template_are_judged_together() -> None:
    assert not evaluation().modes
    assert all(check.thinking is None for check in judge(evaluation(), INT4).checks)


def test_the_report_and_the_metrics_have_both_modes() -> None:
    found = asked_in_both_modes(wrong_at_once=3)
    losses = variant_intervals(VariantDetails(evaluation=found))
    assert losses["quality_loss_with_thoughts"].value == 0
    assert losses["score_without_thoughts"].value == 0.9
    variant = full_variant("int4")
    shown = variant.model_copy(update={"details": variant.details.model_copy(update={"evaluation": found})})
    tables = [block for block in domain_answers(full_report(shown)) if isinstance(block, Table)]
    (both,) = [table for table in tables if "thoughts" in table.columns]
    assert [row[1:3] for row in both.rows] == [("on", "30"), ("off", "30")]
    assert str(both.rows[1][4]).startswith("90.0%")
