"""The gate: every check can fail, and noise alone decides nothing."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import BadInput
from slmops.infra.settings import GateSettings, Settings
from slmops.tasks.exams.endurance import EdgeInputOutcome, Endurance, MemoryGrowth
from slmops.tasks.exams.estimates import Estimate, paired_loss
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.length_sweep import LengthFigures, LengthSweep
from slmops.tasks.exams.template_parity import ParityMismatch, TemplateParity
from slmops.tasks.exams.text import TextComparison
from slmops.tasks.request.gate_limits import with_limits
from slmops.tasks.verdict.checks import GateCheck, check_allowed
from slmops.tasks.verdict.gate import GateVerdict, judge
from slmops.tasks.verdict.thresholds import GateThresholds, thresholds_for
from tests.support.errors import coded

INT8 = thresholds_for("int8", GateSettings())
SHARE = st.floats(0, 1)
VOCABULARY = {"variant": 512, "reference": 512, "compared": 512, "comparable": True}


def evaluation(**figures: Any) -> Evaluation:
    row = {
        "id": 1,
        "answer": "x",
        "exact_match": None,
        "identical_to_reference": True,
        "prompt_tokens": 3,
        "template_matches": True,
        "positions": 5,
        "finite_positions": 5,
        "top1_agreement": 1.0,
        "kl_divergence": 0.0,
    }
    values = {
        "rows": [row] * 4,
        "template_mismatches": {"count": 0, "example": None},
        "positions": 20,
        "finite_logits": 1.0,
        "top1_agreement": 1.0,
        "kl_divergence": 0.0,
        "kl_divergence_p99": 0.0,
        "perplexity": 1.0,
        "reference_perplexity": 1.0,
        "exact_match": None,
        "reference_exact_match": None,
        "identical_answers": 1.0,
        "empty_answers": 0,
        "vocabulary": VOCABULARY,
        "rows_sha256": "0" * 64,
        "threads": 1,
        "versions": {},
        "wall_s": 1.0,
        "peak_rss_bytes": 1,
    }
    return Evaluation(**values | figures)


def endurance(runtime: str = "genai", growth: Estimate | None = None, **edge: Any) -> Endurance:
    outcome = {"name": "emoji", "outcome": "answered", "detail": "ok", "prompt_tokens": 9, "alive": True} | edge
    memory = growth and MemoryGrowth(rss_bytes=(1,) * 48, warmup_requests=16, bytes_per_request=growth)
    return Endurance.model_validate(
        {
            "runtime": runtime,
            "memory": memory,
            "edge_inputs": [EdgeInputOutcome.model_validate(outcome)],
            "notes": (),
            "versions": {},
            "wall_s": 1.0,
        }
    )


def length_sweep(**figures: Any) -> LengthSweep:
    lengths = [
        LengthFigures(prompt_tokens=length, ttft_ms=length / 10, token_generation_throughput_tps=40, valid=True)
        for length in (32, 64, 128)
    ]
    values = {"lengths": lengths, "ttft_scaling_exponent": None, "worst_cliff_ratio": 1.1}
    return LengthSweep.model_validate(values | {"worst_cliff_prompt_tokens": 128, "notes": ()} | figures)


def check_of(verdict: GateVerdict, name: str) -> GateCheck:
    (found,) = [check for check in verdict.checks if check.name == name]
    return found


def limited(precision: str, settings: GateSettings, **parameters: float | None) -> GateThresholds:
    """The thresholds of a run with parameters."""
    return thresholds_for(precision, with_limits(Settings(gate=settings), parameters).gate)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp16", (0.99, 0.005, 0.02)), ("int8", (0.97, 0.02, 0.02)), ("int4", (0.90, 0.10, 0.05))],
)
def test_default_thresholds_of_the_contract(precision: str, expected: tuple[float, float, float]) -> None:
    found = thresholds_for(precision, GateSettings())
    assert (found.min_top1_agreement, found.max_kl_divergence, found.max_quality_loss) == expected


def test_a_setting_overrides_every_precision_and_a_parameter_overrides_the_setting() -> None:
    settings = GateSettings(min_top1_agreement=0.0, max_kl_divergence=9, max_cliff_ratio=7)
    for precision in ("fp16", "int8", "int4"):
        found = limited(precision, settings, max_kl_divergence=0.0, max_quality_loss=None)
        assert (found.min_top1_agreement, found.max_kl_divergence) == (0.0, 0.0)
        assert found.max_quality_loss == thresholds_for(precision, GateSettings()).max_quality_loss
        assert found.max_cliff_ratio == 7


def test_thresholds_out_of_bounds_and_unknown_precisions_are_bad_input() -> None:
    with pytest.raises(BadInput, check=coded("gate-threshold-not-valid", "min_top1_agreement")):
        limited("int8", GateSettings(), min_top1_agreement=1.5)
    with pytest.raises(BadInput, check=coded("gate-threshold-not-valid", "max_kl_divergence")):
        limited("int8", GateSettings(), max_kl_divergence=math.nan)
    with pytest.raises(BadInput, check=coded("gate-precision-unknown", "int3")):
        thresholds_for("int3", GateSettings())


@given(SHARE, st.none() | st.floats(0, 1e9), SHARE)
def test_the_verdict_is_that_of_all_its_checks(top1: float, divergence: float | None, finite: float) -> None:
    verdict = judge(evaluation(top1_agreement=top1, kl_divergence=divergence, finite_logits=finite), INT8)
    passed = {check.name: check.passed for check in verdict.checks}
    assert set(passed) == {"top1_agreement", "kl_divergence", "finite_logits"}
    assert verdict.passed == all(passed.values())
    assert verdict.failed_checks == tuple(check for check in verdict.checks if not check.passed)
    noise = 1e-11
    if abs(top1 - 0.97) > noise:
        assert passed["top1_agreement"] == (top1 >= 0.97)
    if divergence is None or abs(divergence - 0.02) > noise:
        assert passed["kl_divergence"] == (divergence is not None and divergence <= 0.02)
    if 1 - finite > noise or finite == 1:
        assert passed["finite_logits"] == (finite == 1)
    assert GateVerdict.model_validate_json(verdict.model_dump_json()) == verdict
    json.dumps(verdict.model_dump(mode="json"), allow_nan=False)


@pytest.mark.parametrize(
    ("right", "reference_right", "count", "passed", "decided"),
    [
        (400, 400, 400, True, True),  # no loss in 400 rows shows that it is under 0.02
        (5, 5, 5, True, False),  # nor does none in five
        (4, 5, 5, True, False),  # one of five wrong is no proof of a loss
        (0, 5, 5, False, True),  # all of five wrong is
        (180, 200, 200, False, True),
        (197, 200, 200, True, False),
        (200, 180, 200, True, True),  # better than the reference
    ],
)
def test_a_loss_fails_beyond_noise_and_passes_beyond_noise(
    right: int, reference_right: int, count: int, passed: bool, decided: bool
) -> None:
    def scores(number: int) -> list[float]:
        return [1.0] * number + [0.0] * (count - number)

    verdict = judge(evaluation(quality_loss=paired_loss(scores(reference_right), scores(right))), INT8)
    check = check_of(verdict, "quality_loss")
    assert (check.passed, check.decided) == (passed, decided)
    assert check.value == pytest.approx((reference_right - right) / count)
    assert verdict.passed == passed
    assert any("not decided" in note for note in verdict.notes) == (not decided)


def answered(reference: list[float], variant: list[float], **figures: Any) -> Evaluation:
    """Return the evaluation of these scores, row by row, with distributions that miss int8's limits by far."""
    plain = evaluation().rows[0]
    rows = [
        plain.model_copy(update={"id": number, "score": score, "reference_score": expected})
        for number, (expected, score) in enumerate(zip(reference, variant, strict=True))
    ]
    far = {"top1_agreement": 0.7, "kl_divergence": 0.58}
    return evaluation(rows=rows, quality_loss=paired_loss(reference, variant), **far | figures)


def test_with_enough_rows_the_score_decides_and_the_distributions_only_reject_a_broken_model() -> None:
    right = [1.0] * 200
    rounded = judge(answered(right, right), INT8)
    assert (rounded.passed, rounded.decided_by) == (True, "score")
    assert any("kl divergence would have failed: 0.58, at most 0.02" in note for note in rounded.notes)
    broken = judge(answered(right, right, kl_divergence=3.0, top1_agreement=0.2), INT8)
    assert [check.name for check in broken.failed_checks] == ["top1_agreement", "kl_divergence"]
    worse = judge(answered(right, [0.0] * 20 + right[20:]), INT8)
    assert [check.name for check in worse.failed_checks] == ["quality_loss"]


@pytest.mark.parametrize(
    ("reference", "variant"),
    [
        ([1.0] * 5, [1.0] * 5),  # too few rows: the interval holds the allowed loss
        ([0.0] * 400, [0.0] * 400),  # rows that the source answers wrong show no loss of anything
        ([1.0] * 6 + [0.0] * 994, [1.0] * 6 + [0.0] * 994),  # nor does a source that is right by chance
    ],
)
def test_rows_that_do_not_suffice_leave_the_decision_to_the_distributions(
    reference: list[float], variant: list[float]
) -> None:
    verdict = judge(answered(reference, variant), INT8)
    assert verdict.decided_by == "distributions"
    assert [check.name for check in verdict.failed_checks] == ["top1_agreement", "kl_divergence"]


@pytest.mark.parametrize(
    ("low", "high", "divergence", "passed", "decided"),
    [
        (0.951, 0.973, 0.0067, True, False),  # a sound int8 of SmolLM2-135M
        (0.951, 0.969, 0.0067, False, True),
        (0.951, 0.973, 0.03, False, False),
    ],
)
def test_an_agreement_fails_beyond_noise_and_the_divergence_decides_within_it(
    low: float, high: float, divergence: float, passed: bool, decided: bool
) -> None:
    interval = Estimate(value=0.962, low=low, high=high)
    figures = {"top1_agreement": 0.962, "top1_agreement_interval": interval, "kl_divergence": divergence}
    verdict = judge(evaluation(**figures), INT8)
    assert (verdict.passed, check_of(verdict, "top1_agreement").decided) == (passed, decided)


@pytest.mark.parametrize(
    ("near", "divergence", "failed"),
    [
        (0.907, 0.086, []),
        (0.89, 0.086, ["top1_agreement"]),
        (None, 0.086, ["top1_agreement"]),
        (0.907, 0.12, ["kl_divergence"]),
    ],
)
def test_an_agreement_that_only_near_ties_miss_leaves_the_decision_to_the_divergence(
    near: float | None, divergence: float, failed: list[str]
) -> None:
    """The first figures are those of a sound int4 of SmolLM2-135M."""
    figures = {"top1_agreement": 0.867, "near_agreement": near, "kl_divergence": divergence}
    verdict = judge(evaluation(**figures), thresholds_for("int4", GateSettings()))
    assert [check.name for check in verdict.failed_checks] == failed
    if "top1_agreement" not in failed:
        assert not check_of(verdict, "top1_agreement").decided
        assert any("0.867, 0.907 if near ties count as agreement" in note for note in verdict.notes)


def test_a_limit_of_the_distributions_that_is_named_holds_whatever_decides() -> None:
    right = [1.0] * 200
    named = limited("int8", GateSettings(min_top1_agreement=0.97), max_kl_divergence=0.5)
    verdict = judge(answered(right, right), named)
    assert verdict.decided_by == "score"
    assert [check.name for check in verdict.failed_checks] == ["top1_agreement", "kl_divergence"]


def test_an_allowed_check_fails_loudly_and_keeps_nothing_back() -> None:
    far = evaluation(kl_divergence=0.58)
    verdict = judge(far, INT8, allow=("kl_divergence", "steadiness"))
    assert verdict.passed
    assert [check.name for check in verdict.allowed_checks] == ["kl_divergence"]
    assert verdict.warnings == ("kl divergence failed and was allowed: 0.58, at most 0.02 is required.",)
    assert not judge(far, INT8, allow=("top1_agreement",)).passed


@pytest.mark.parametrize("name", ["vocabulary", "finite_logits", "kl-divergence", ""])
def test_what_cannot_be_allowed_is_refused_with_the_checks_that_can(name: str) -> None:
    with pytest.raises(BadInput, check=coded("check-not-allowable", repr(name), "kl_divergence, quality_loss")):
        check_allowed(["steadiness", name])
    assert check_allowed(["steadiness", "steadiness"]) == ("steadiness",)


def test_without_expected_answers_the_score_is_not_judged_and_that_is_reported() -> None:
    verdict = judge(evaluation(), INT8)
    assert [check.name for check in verdict.checks] == ["top1_agreement", "kl_divergence", "finite_logits"]
    assert "no expected answers" in verdict.notes[0]


def test_without_a_reference_finite_logits_and_answers_are_judged() -> None:
    alone = {"vocabulary": VOCABULARY | {"reference": None}, "top1_agreement": None, "kl_divergence": None}
    verdict = judge(evaluation(**alone), INT8)
    assert [check.name for check in verdict.checks] == ["finite_logits", "non_empty_answers"]
    assert verdict.passed
    assert "no source checkpoint" in verdict.notes[0]
    assert not judge(evaluation(**alone, empty_answers=1), INT8).passed
    assert not judge(evaluation(**alone, finite_logits=0.99), INT8).passed


def test_another_vocabulary_is_named_in_place_of_distributions_that_cannot_be_compared() -> None:
    truncated = {"variant": 500, "reference": 512, "compared": 500, "comparable": False}
    verdict = judge(evaluation(vocabulary=truncated, top1_agreement=None, kl_divergence=None), INT8)
    (check,) = verdict.failed_checks
    assert (check.name, check.detail) == ("vocabulary", "500 tokens, the reference 512")


def test_answers_in_another_format_fail() -> None:
    conformity = Estimate(value=0.94, low=0.9, high=0.97)
    (check,) = judge(evaluation(output_conformity=conformity), INT8).failed_checks
    assert (check.name, check.value, check.threshold, check.low) == ("output_format", 0.94, 0.95, 0.9)
    assert judge(evaluation(output_conformity=Estimate(value=0.95, low=0.9, high=0.98)), INT8).passed


def test_answers_without_the_format_that_the_source_s_lack_too_are_reported_and_excused() -> None:
    faults = {"output_fault": "no JSON", "reference_output_fault": "no JSON"}
    rows = [row.model_copy(update=faults) for row in evaluation().rows]
    formless = evaluation(rows=rows, output_conformity=Estimate(value=0, low=0, high=0.6))
    verdict = judge(formless, INT8)
    assert verdict.passed
    assert verdict.warnings[0].startswith("4 of 4 answers lack the output format, like the source")
    (check,) = judge(formless, thresholds_for("int8", GateSettings(min_output_conformity=0.95))).failed_checks
    assert (check.name, check.value) == ("output_format", 0)
    own = rows[0].model_copy(update={"reference_output_fault": None})
    (check,) = judge(formless.model_copy(update={"rows": (own, *rows[1:])}), INT8).failed_checks
    assert (check.name, check.value) == ("output_format", 0.75)


@pytest.mark.parametrize(
    ("source", "variant", "rejected", "warned"),
    [(8, 8, False, False), (8, 0, True, False), (8, 7, False, False), (0, 0, False, True), (0, 8, False, False)],
)
def test_answers_that_run_on_where_the_source_s_end_fail(
    source: int, variant: int, rejected: bool, warned: bool
) -> None:
    plain = evaluation().rows[0]
    rows = [
        plain.model_copy(update={"ended": number < variant, "reference_ended": number < source}) for number in range(8)
    ]
    verdict = judge(evaluation(rows=rows), INT8)
    assert [check.name for check in verdict.failed_checks] == ["ended_answers"] * rejected
    assert any("ended within" in text for text in verdict.warnings) == warned


def test_prompts_that_differ_are_noted() -> None:
    mismatch = {"id": 1, "reference": "a", "variant": "b", "reference_ids": [1], "variant_ids": [2]}
    verdict = judge(evaluation(template_mismatches={"count": 3, "example": mismatch}), INT8)
    assert "3 of 4 prompts" in verdict.notes[-1]


def test_a_template_that_a_runtime_renders_differently_fails() -> None:
    mismatch = ParityMismatch(
        conversation="one turn", runtime="foundry", expected="<a>", found="<b>", expected_tokens=3, found_tokens=4
    )
    given = {"conversations": 4, "mismatches": (), "broken_control_tokens": (), "notes": ()}
    assert judge(evaluation(), INT8, parity=TemplateParity(**given)).passed
    for fault, detail in (
        ({"mismatches": (mismatch,)}, "foundry renders 'one turn' differently"),
        ({"broken_control_tokens": ("<|im_end|>",)}, "<|im_end|> is not one token"),
    ):
        (check,) = judge(evaluation(), INT8, parity=TemplateParity(**given | fault)).failed_checks
        assert (check.name, check.detail) == ("template_parity", detail)


@pytest.mark.parametrize("runtime", ["genai", "foundry"])
def test_growing_memory_fails_only_beyond_its_interval(runtime: str) -> None:
    sure = Estimate(value=100_000, low=90_000, high=110_000)
    unsure = Estimate(value=100_000, low=-20_000, high=220_000)
    (check,) = judge(evaluation(), INT8, endurance=[endurance(runtime, sure)]).failed_checks
    assert (check.name, check.value) == (f"memory_growth_{runtime}", 100_000)
    verdict = judge(evaluation(), INT8, endurance=[endurance(runtime, unsure)])
    assert verdict.passed
    assert not check_of(verdict, f"memory_growth_{runtime}").decided
    assert judge(evaluation(), INT8, endurance=[endurance(runtime)]).passed


@pytest.mark.parametrize("edge", [{"outcome": "crashed"}, {"alive": False}])
def test_an_input_that_ends_in_a_crash_fails(edge: dict[str, Any]) -> None:
    (check,) = judge(evaluation(), INT8, endurance=[endurance("foundry", **edge)]).failed_checks
    assert (check.name, check.detail) == ("edge_input_foundry", "emoji")
    assert judge(evaluation(), INT8, endurance=[endurance("foundry", outcome="refused")]).passed


def test_a_cliff_and_a_length_without_an_answer_fail() -> None:
    assert judge(evaluation(), INT8, length_sweep=length_sweep()).passed
    (check,) = judge(evaluation(), INT8, length_sweep=length_sweep(worst_cliff_ratio=4.5)).failed_checks
    assert (check.name, check.detail) == ("steadiness", "at 128 prompt tokens")
    broken = LengthFigures(prompt_tokens=256, ttft_ms=1, token_generation_throughput_tps=40, valid=False)
    (check,) = judge(evaluation(), INT8, length_sweep=length_sweep(lengths=[broken])).failed_checks
    assert (check.name, check.detail) == ("valid_lengths", "256 tokens")


def test_the_users_text_is_judged_by_the_same_thresholds() -> None:
    def text(top1: float | None, divergence: float | None, reference: float | None = 3.0) -> TextComparison:
        top1_agreement, kl_divergence = (
            None if value is None else Estimate(value=value, low=value, high=value) for value in (top1, divergence)
        )
        return TextComparison(
            origin="a.txt",
            tokens=100,
            positions=50,
            finite_logits=1.0,
            perplexity=3.0,
            reference_perplexity=reference,
            perplexity_ratio=None,
            top1_agreement=top1_agreement,
            kl_divergence=kl_divergence,
            kl_divergence_p99=None,
        )

    assert judge(evaluation(), INT8, text=text(0.97, 0.02)).passed
    assert judge(evaluation(), INT8, text=text(None, None, reference=None)).passed
    for figures, name in (((0.96, 0.0), "text_top1_agreement"), ((1.0, 0.03), "text_kl_divergence")):
        (check,) = judge(evaluation(), INT8, text=text(*figures)).failed_checks
        assert check.name == name
    assert len(judge(evaluation(), INT8, text=text(None, None)).failed_checks) == 2
    near = Estimate(value=0.98, low=0.98, high=0.98)
    assert judge(evaluation(), INT8, text=text(0.96, 0.0).model_copy(update={"near_agreement": near})).passed
