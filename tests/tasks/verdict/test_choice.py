"""Which variant serves under the model's name, and what is said of the others."""

from slmops.infra.storage.evidence import Selection
from slmops.tasks.request.budget import Budget
from slmops.tasks.verdict.choice import Judged, choose_variant
from slmops.tasks.verdict.pareto import Candidate

RIGHT, WRONG = 1.0, 0.0


def judged(name: str, size_mb: int, tps: float, right: int | None = 100, **changes: float) -> Judged:
    figures = {"peak_rss_bytes": 2_000_000 * size_mb, "ttft_ms": 10_000 / tps, "kl_divergence": 0.01}
    candidate = Candidate(
        name=name,
        size_bytes=1_000_000 * size_mb,
        token_generation_throughput_tps=tps,
        quality_loss=None if right is None else 1 - right / 100,
        **(figures | changes),
    )
    return Judged(candidate=candidate, scores=None if right is None else (RIGHT,) * right + (WRONG,) * (100 - right))


INT4, INT8, FP16 = judged("int4", 300, 42), judged("int8", 560, 25), judged("fp16", 990, 11)


def test_without_a_budget_the_smallest_precision_that_passed_is_chosen() -> None:
    choice = choose_variant([FP16, INT8, INT4], None)
    assert choice.selected == "int4"
    assert choice.reasons == dict.fromkeys(("fp16", "int8"), "int4 also passed the gate and is smaller")
    assert choose_variant([FP16, INT8], None).selected == "int8"
    assert choose_variant([FP16], None) == Selection(
        selected="fp16", reason="fp16 is the smallest precision that passed the gate."
    )


def test_nothing_passed_nothing_chosen() -> None:
    assert choose_variant([], None).selected is None
    assert choose_variant([], Budget(max_size=1)).selected is None


def test_limits_are_kept_and_named() -> None:
    choice = choose_variant([FP16, INT8, INT4], Budget(max_size=600_000_000, min_tps=20))
    assert choice.selected == "int4"
    assert choice.reasons["fp16"] == "over the budget: size 990.0 MB, 11.0 tok/s"


def test_of_like_quality_the_fastest_is_chosen() -> None:
    near = [judged("int8", 560, 25, right=99, kl_divergence=0.001), judged("int4", 300, 42, right=98)]
    choice = choose_variant(near, Budget(max_size=10**9))
    assert choice.selected == "int4"
    assert choice.reason == "int4 answers as well as int8 within the noise, and is the fastest of these."
    assert choice.reasons == {"int8": "not measurably better than int4, and slower (25.0 instead of 42.0 tok/s)"}


def test_a_measurably_worse_score_is_not_chosen_for_its_speed() -> None:
    choice = choose_variant([INT8, judged("int4", 300, 42, right=80)], Budget(max_size=10**9))
    assert choice.selected == "int8"
    assert choice.reason == "int8 has the best quality under the budget."
    assert choice.reasons["int4"].startswith("its score is 0.200 below that of int8, at least 0.1")


def test_a_dominated_variant_is_dropped() -> None:
    choice = choose_variant([INT4, judged("int8", 560, 25, right=90)], Budget(max_size=10**9))
    assert choice.selected == "int4"
    assert choice.reason == "int4 keeps the budget, and no other variant within the budget is better in any figure."
    assert choice.reasons == {"int8": "int4 is better in at least one figure and worse in none"}


def test_at_like_speed_the_smallest_is_chosen() -> None:
    near = [judged("int8", 560, 42.5, kl_divergence=0.001), judged("int4", 300, 42)]
    choice = choose_variant(near, Budget(max_size=10**9))
    assert choice.selected == "int4"
    assert choice.reasons == {"int8": "not measurably better than int4, and larger"}


def test_without_expected_answers_nearness_to_the_reference_is_the_quality() -> None:
    known = [judged("int8", 560, 25, right=None, kl_divergence=0.001), judged("int4", 300, 42, right=None)]
    choice = choose_variant(known, Budget(max_size=10**9))
    assert choice.selected == "int8"
    assert choice.reasons["int4"] == "farther from the reference than int8 (KL divergence 0.0100 and 0.0010)"


def test_a_budget_that_nothing_keeps_names_the_nearest() -> None:
    choice = choose_variant([FP16, INT8, INT4], Budget(max_size=100_000_000))
    assert choice.selected is None
    assert choice.reason == "No variant keeps the budget. The nearest is int4: size 300.0 MB."
    assert set(choice.reasons) == {"fp16", "int8", "int4"}


def busy(judged: Judged) -> Judged:
    return judged.model_copy(update={"candidate": judged.candidate.model_copy(update={"reliable": False})})


def test_a_limit_of_speed_that_a_busy_machine_exceeds_is_undecided() -> None:
    budget = Budget(max_size=600_000_000, min_tps=30)
    assert choose_variant([FP16, INT8], budget).reason.startswith("No variant keeps the budget.")
    choice = choose_variant([busy(FP16), busy(INT8)], budget)
    assert choice.selected is None
    assert "undecided whether int8 keeps the budget" in choice.reason
    assert choice.reasons["int8"] == "undecided on a busy machine: 25.0 tok/s"
    assert choice.reasons["fp16"] == "over the budget: size 990.0 MB"
    assert choose_variant([busy(INT8), busy(INT4)], budget).selected == "int4"  # a busy machine only slows


def test_on_a_busy_machine_speed_does_not_decide_between_equals() -> None:
    near = [judged("int8", 560, 90), judged("int4", 300, 42)]
    assert choose_variant(near, Budget(max_size=10**9)).selected == "int8"
    choice = choose_variant([near[0], busy(near[1])], Budget(max_size=10**9))
    assert choice.selected == "int4"
