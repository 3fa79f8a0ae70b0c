"""The Pareto front: the variants that no other variant dominates."""

import math
from collections.abc import Sequence

from pydantic import Field, FiniteFloat

from slmops.infra.records import Record, later_field

# Relative differences that are ignored: for speed and memory the spread of repeated runs on a shared machine, for size
# the bytes of the graph itself, for the divergence rounding.
NOISE = {
    "size_bytes": 0.005,
    "peak_rss_bytes": 0.05,
    "ttft_ms": 0.05,
    "token_generation_throughput_tps": 0.05,
    "kl_divergence": 0.01,
}
LEAST_DIVERGENCE = 1e-9
UNKNOWN = 1e9  # a missing figure is worse than any other


class Candidate(Record):
    """The costs and quality of a variant or a trial.

    `quality_loss` is the task score below the reference's, `kl_divergence` in nats per token; both are None if there is
    no such figure.
    """

    name: str
    size_bytes: int = Field(gt=0)
    peak_rss_bytes: int = Field(gt=0)
    ttft_ms: FiniteFloat = Field(gt=0)
    token_generation_throughput_tps: FiniteFloat = Field(gt=0)
    quality_loss: FiniteFloat | None
    kl_divergence: FiniteFloat | None
    reliable: bool = later_field(True)


def pareto_front(candidates: Sequence[Candidate]) -> dict[str, str | None]:
    """Return name -> None for a member of the Pareto front, else the name of a front member that dominates it.

    One dominates another if it is worse in no figure and better in at least one; differences within `NOISE` are
    ignored. With tolerance alone, three candidates could dominate each other in a cycle. To prevent this, the
    dominating one must also have the smaller quality loss or, at equal loss, the smaller product of its costs. The
    names must differ; the order of `candidates` does not matter.
    """
    front: list[Candidate] = []
    dominated_by: dict[str, str | None] = {}
    for candidate in sorted(candidates, key=lambda candidate: (*_rank(candidate), candidate.name)):
        dominator = next((member for member in front if dominates(member, candidate)), None)
        dominated_by[candidate.name] = dominator.name if dominator else None
        if dominator is None:
            front.append(candidate)
    return {candidate.name: dominated_by[candidate.name] for candidate in candidates}


def dominates(candidate: Candidate, other: Candidate) -> bool:
    """Whether `candidate` dominates `other`; see `pareto_front`."""
    ours, theirs = _costs(candidate), _costs(other)
    loss, other_loss = _loss(candidate), _loss(other)
    if loss > other_loss or any(ours[name] > theirs[name] + _reach(name) for name in NOISE):
        return False
    is_better = loss < other_loss or any(ours[name] + _reach(name) < theirs[name] for name in NOISE)
    return is_better and _rank(candidate) < _rank(other)


def _rank(candidate: Candidate) -> tuple[float, float]:
    return _loss(candidate), math.fsum(_costs(candidate).values())


def _loss(candidate: Candidate) -> float:
    # Rounded, because 1.0 - 0.98 is a little more than 0.02.
    return UNKNOWN if candidate.quality_loss is None else round(candidate.quality_loss, 9)


def _costs(candidate: Candidate) -> dict[str, float]:
    """Logarithms of the costs, so that a relative difference becomes a difference; a larger value is worse."""
    divergence = UNKNOWN if candidate.kl_divergence is None else max(candidate.kl_divergence, LEAST_DIVERGENCE)
    return {
        "size_bytes": math.log(candidate.size_bytes),
        "peak_rss_bytes": math.log(candidate.peak_rss_bytes),
        "ttft_ms": math.log(candidate.ttft_ms),
        "token_generation_throughput_tps": -math.log(candidate.token_generation_throughput_tps),
        "kl_divergence": math.log(divergence),
    }


def _reach(name: str) -> float:
    return math.log1p(NOISE[name])
