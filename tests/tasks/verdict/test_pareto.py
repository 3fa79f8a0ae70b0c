"""The Pareto front over candidates."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.tasks.verdict.pareto import NOISE, Candidate, dominates, pareto_front


def _candidate(name: str, **figures: float | None) -> Candidate:
    usual: dict[str, float | None] = {
        "size_bytes": 1_000_000,
        "peak_rss_bytes": 100_000_000,
        "ttft_ms": 100.0,
        "token_generation_throughput_tps": 20.0,
        "quality_loss": 0.0,
        "kl_divergence": 0.01,
    }
    return Candidate.model_validate({"name": name, **usual, **figures})


WORSE = {
    "size_bytes": 1_010_000,
    "peak_rss_bytes": 110_000_000,
    "ttft_ms": 110.0,
    "token_generation_throughput_tps": 18.0,
    "quality_loss": 0.01,
    "kl_divergence": 0.02,
}
WITHIN_NOISE = {
    "size_bytes": 1_001_000,
    "peak_rss_bytes": 104_000_000,
    "ttft_ms": 104.0,
    "token_generation_throughput_tps": 19.2,
    "kl_divergence": 0.01005,
}


@pytest.mark.parametrize("figure", WORSE)
def test_worse_in_one_figure_and_better_in_none_is_dominated(figure: str) -> None:
    assert pareto_front([_candidate("b", **{figure: WORSE[figure]}), _candidate("a")]) == {"b": "a", "a": None}


@pytest.mark.parametrize("figure", WITHIN_NOISE)
def test_a_difference_within_noise_dominates_nobody(figure: str) -> None:
    assert pareto_front([_candidate("a"), _candidate("b", **{figure: WITHIN_NOISE[figure]})]) == {"a": None, "b": None}


def test_noise_does_not_save_what_is_clearly_worse() -> None:
    slow = _candidate("slow", token_generation_throughput_tps=10.0, ttft_ms=98.0)
    assert pareto_front([slow, _candidate("fast")]) == {"slow": "fast", "fast": None}


def test_a_trade_off_keeps_both() -> None:
    assert pareto_front([_candidate("small", size_bytes=500_000, kl_divergence=0.05), _candidate("exact")]) == {
        "small": None,
        "exact": None,
    }


@pytest.mark.parametrize("figure", ["quality_loss", "kl_divergence"])
def test_a_figure_that_is_missing_beats_nobody(figure: str) -> None:
    unknown = _candidate("unknown", **{figure: None})
    assert pareto_front([unknown, _candidate("known")]) == {"unknown": "known", "known": None}
    faster = unknown.model_copy(update={"token_generation_throughput_tps": 40.0})
    assert pareto_front([faster, _candidate("known")]) == {"unknown": None, "known": None}
    slower = _candidate("slower", **{figure: None}, token_generation_throughput_tps=10.0)
    assert pareto_front([unknown, slower]) == {"unknown": None, "slower": "unknown"}


def test_three_that_beat_each_other_within_noise_do_not_all_go() -> None:
    # Each is 6 % better than the next in one figure and within noise of it in the others.
    ring = [
        _candidate("a", peak_rss_bytes=100_000_000, ttft_ms=103.0, token_generation_throughput_tps=100 / 1.06),
        _candidate("b", peak_rss_bytes=106_000_000, ttft_ms=100.0, token_generation_throughput_tps=100 / 1.03),
        _candidate("c", peak_rss_bytes=103_000_000, ttft_ms=106.0, token_generation_throughput_tps=100.0),
    ]
    assert None in pareto_front(ring).values()


CLOSE = st.floats(0.85, 1.15)
FIGURES = st.fixed_dictionaries(
    {
        "size_bytes": CLOSE.map(lambda factor: round(1_000_000 * factor)),
        "peak_rss_bytes": CLOSE.map(lambda factor: round(100_000_000 * factor)),
        "ttft_ms": CLOSE.map(lambda factor: 100 * factor),
        "token_generation_throughput_tps": CLOSE.map(lambda factor: 20 * factor),
        "quality_loss": st.none() | st.sampled_from([-0.01, 0.0, 0.01]),
        "kl_divergence": st.none() | CLOSE.map(lambda factor: factor / 100) | st.just(0.0),
    }
)
CANDIDATES = st.lists(FIGURES, min_size=1, max_size=8).map(
    lambda all_figures: [_candidate(f"c{index}", **figures) for index, figures in enumerate(all_figures)]
)


@given(candidates=CANDIDATES, seed=st.integers(0, 1000))
def test_the_front_is_never_empty_and_every_other_is_worse_than_one_of_it(
    candidates: list[Candidate], seed: int
) -> None:
    by_name = {candidate.name: candidate for candidate in candidates}
    front = pareto_front(candidates)
    assert None in front.values()
    assert list(front) == list(by_name)
    for name, dominator in front.items():
        if dominator is None:
            assert not any(dominates(other, by_name[name]) for other in candidates if front[other.name] is None)
            continue
        assert front[dominator] is None
        better, worse = by_name[dominator], by_name[name]
        if None not in (better.quality_loss, worse.quality_loss):
            assert better.quality_loss <= worse.quality_loss
        assert better.ttft_ms <= worse.ttft_ms * (1 + NOISE["ttft_ms"]) * (1 + 1e-9)
        assert better.size_bytes <= worse.size_bytes * (1 + NOISE["size_bytes"]) * (1 + 1e-9)
    shuffled = random.Random(seed).sample(candidates, len(candidates))
    assert pareto_front(shuffled) == front


@given(figures=st.lists(st.tuples(CLOSE, CLOSE, CLOSE), min_size=3, max_size=9))
def test_noise_alone_never_empties_the_front(figures: list[tuple[float, float, float]]) -> None:
    candidates = [
        _candidate(
            f"c{index}",
            peak_rss_bytes=round(100_000_000 * rss),
            ttft_ms=100 * ttft,
            token_generation_throughput_tps=20 * speed,
        )
        for index, (rss, ttft, speed) in enumerate(figures)
    ]
    assert None in pareto_front(candidates).values()
