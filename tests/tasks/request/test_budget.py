"""The budget as users write it, and what it says of a variant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import BadInput
from slmops.tasks.request.budget import Budget, parse_budget
from slmops.tasks.verdict.pareto import Candidate

CANDIDATE = Candidate(
    name="int4",
    size_bytes=304_000_000,
    peak_rss_bytes=586_000_000,
    ttft_ms=250.0,
    token_generation_throughput_tps=42.0,
    quality_loss=0.02,
    kl_divergence=0.05,
)


def test_every_key_and_unit_is_read() -> None:
    budget = parse_budget(["max-size=300MB", "max-rss=1 GiB", "max-ttft=0.2s", "min-tps=20", "max-quality-loss=0.02"])
    assert budget == Budget(max_size=300_000_000, max_rss=2**30, max_ttft=200.0, min_tps=20.0, max_quality_loss=0.02)
    assert parse_budget(["max_ttft=200 ms"]) == Budget(max_ttft=200.0)
    assert parse_budget(()) is None


@pytest.mark.parametrize(
    ("pairs", "fault"),
    [
        (["max-size"], "'max-size' is unknown"),
        (["max-weight=3kg"], "'max-weight=3kg' is unknown"),
        (["max-size=big"], "'max-size=big' has no valid value"),
        (["max-size="], "has no valid value"),
        (["max-size=-1MB"], "max-size"),
        (["max-size=0"], "max-size: Input should be greater than 0"),
        (["max-size=nan"], "has no valid value"),
        (["max-ttft=200"], "has no valid value"),
        (["max-ttft=200MB"], "has no valid value"),
        (["max-ttft=0ms"], "max-ttft: Input should be greater than 0"),
        (["min-tps=fast"], "has no valid value"),
        (["min-tps=inf"], "min-tps: Input should be a finite number"),
        (["max-quality-loss=2"], "max-quality-loss: Input should be less than or equal to 1"),
        (["max-size=1MB", "max_size=2MB"], "names max_size twice"),
    ],
)
def test_what_makes_no_sense_is_refused(pairs: list[str], fault: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_budget(pairs)
    assert fault in refused.value.message
    assert "max-size=300MB" in refused.value.what_to_do or "Name it once" in refused.value.what_to_do


@given(st.lists(st.text(max_size=30) | st.from_regex(r"(max|min)-[a-z]{3,8}=\w{0,6}", fullmatch=True), max_size=3))
def test_any_text_is_a_budget_or_bad_input(pairs: list[str]) -> None:
    try:
        parse_budget(pairs)
    except BadInput as refused:
        assert refused.what_to_do


def test_a_candidate_within_every_limit_exceeds_none() -> None:
    assert Budget(max_size=304_000_000, max_rss=600_000_000, max_ttft=250.0, min_tps=42.0).excesses(CANDIDATE) == {}
    loss = CANDIDATE.model_copy(update={"quality_loss": 1.0 - 0.98})  # a little more than 0.02
    assert Budget(max_quality_loss=0.02).excesses(loss) == {}


def test_each_limit_that_is_not_kept_is_named_with_its_factor() -> None:
    budget = Budget(max_size=152_000_000, max_rss=1, max_ttft=125.0, min_tps=84.0, max_quality_loss=0.01)
    excesses = budget.excesses(CANDIDATE)
    assert excesses["size 304.0 MB"] == 2
    assert excesses["TTFT 250.0 ms"] == 2
    assert excesses["42.0 tok/s"] == 2
    assert excesses["quality loss 0.020"] == 2
    assert len(excesses) == 5


def test_an_unknown_quality_loss_keeps_no_limit() -> None:
    unknown = CANDIDATE.model_copy(update={"quality_loss": None})
    assert list(Budget(max_quality_loss=1).excesses(unknown)) == ["quality loss unknown (no expected answers)"]
    assert Budget(max_size=400_000_000).excesses(unknown) == {}
