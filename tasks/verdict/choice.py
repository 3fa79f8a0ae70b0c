"""The choice of the variant that serves under the model's name, and the reasons for it."""

from collections.abc import Mapping, Sequence

from slmops.infra.records import Record
from slmops.infra.storage.evidence import Selection
from slmops.tasks.exams.estimates import paired_loss
from slmops.tasks.request.budget import Budget
from slmops.tasks.verdict.pareto import NOISE, Candidate, pareto_front

# Microsoft's tutorial: start with int4, fall back to int8 and then fp16 if quality is not sufficient.
PREFERENCE = ("int4", "int8", "fp16", "fp32")


class Judged(Record):
    """A variant that passed the gate, and its score on each row in their order (None: no expected answers).

    `allowed` names the checks that failed and were allowed to fail.
    """

    candidate: Candidate
    scores: tuple[float, ...] | None
    allowed: tuple[str, ...] = ()


def choose_variant(passed: Sequence[Judged], budget: Budget | None) -> Selection:
    """Choose among variants that passed the gate, named by their precision.

    Without a budget the smallest precision is chosen, as Microsoft's tutorial does. Under a budget: of the variants
    that keep every limit the dominated ones are dropped (`pareto_front`), then those whose score is measurably below
    the best one's (`paired_loss`; without expected answers: whose KL divergence is larger), and the fastest remaining
    one in token generation is chosen, of equally fast ones the smallest. Figures of speed from a busy machine decide
    nothing: a limit that they exceed is undecided, and of equals the smallest is chosen.
    """
    if not passed:
        return Selection(selected=None, reason="No variant passed the gate.")
    if budget is None:
        return _smallest({variant.candidate.name: variant.allowed for variant in passed})
    excesses = {variant.candidate.name: budget.excesses(variant.candidate) for variant in passed}
    reasons = {name: f"over the budget: {', '.join(found)}" for name, found in excesses.items() if found}
    undecided = {variant.candidate.name: budget.undecided(variant.candidate) for variant in passed}
    undecided = {name: found for name, found in undecided.items() if found and name not in reasons}
    reasons |= {name: f"undecided on a busy machine: {', '.join(found)}" for name, found in undecided.items()}
    fitting = [variant for variant in passed if variant.candidate.name not in reasons]
    if not fitting and undecided:
        reason = (
            f"The machine was busy: it is undecided whether {' or '.join(undecided)} keeps the budget. Deploy again "
            "on an idle machine."
        )
        return Selection(selected=None, reason=reason, reasons=reasons)
    if not fitting:
        nearest = min(excesses, key=lambda name: (max(excesses[name].values()), name))
        reason = f"No variant keeps the budget. The nearest is {nearest}: {', '.join(excesses[nearest])}."
        return Selection(selected=None, reason=reason, reasons=reasons)
    busy = any(not variant.candidate.reliable for variant in fitting)
    fitting = [_without_speed(variant) for variant in fitting] if busy else fitting
    for name, dominator in pareto_front([variant.candidate for variant in fitting]).items():
        if dominator is not None:
            reasons[name] = f"{dominator} is better in at least one figure and worse in none"
    front = [variant for variant in fitting if variant.candidate.name not in reasons]
    best = max(front, key=_quality)
    for point in front:
        worse = _worse_than(best, point)
        if worse:
            reasons[point.candidate.name] = worse
    equals = [point.candidate for point in front if point.candidate.name not in reasons]
    chosen = _fastest(equals)
    for candidate in equals:
        if candidate is not chosen:
            reasons[candidate.name] = f"not measurably better than {chosen.name}, and {_costlier(candidate, chosen)}"
    advantage = "smallest (the machine was too busy to compare speeds)" if busy else "fastest"
    reason = _reason(chosen, best, equals, front, advantage)
    return Selection(selected=chosen.name, reason=reason, reasons=reasons)


def _without_speed(judged: Judged) -> Judged:
    alike = {"ttft_ms": 1.0, "token_generation_throughput_tps": 1.0}
    return judged.model_copy(update={"candidate": judged.candidate.model_copy(update=alike)})


def _smallest(passed: Mapping[str, Sequence[str]]) -> Selection:
    """Choose by name; the values are the checks that were allowed to fail."""
    selected = min(passed, key=PREFERENCE.index)
    reasons = {name: f"{selected} also passed the gate and is smaller" for name in passed if name != selected}
    allowed = ", ".join(name.replace("_", " ") for name in passed[selected])
    but = f", where {allowed} was allowed to fail" if allowed else ""
    return Selection(
        selected=selected, reason=f"{selected} is the smallest precision that passed the gate{but}.", reasons=reasons
    )


def _quality(judged: Judged) -> tuple[float, float]:
    """A larger value is better: the score, then the closeness to the reference."""
    score = 0.0 if judged.scores is None else sum(judged.scores) / len(judged.scores)
    divergence = judged.candidate.kl_divergence
    return round(score, 9), float("-inf") if divergence is None else -divergence


def _worse_than(best: Judged, other: Judged) -> str:
    if other is best:
        return ""
    if best.scores is not None and other.scores is not None:
        loss = paired_loss(best.scores, other.scores)
        if loss.low <= 0:
            return ""
        return f"its score is {loss.value:.3f} below that of {best.candidate.name}, at least {loss.low:.3f}"
    ours, theirs = best.candidate.kl_divergence, other.candidate.kl_divergence
    if ours is None or theirs is None or theirs <= ours * (1 + NOISE["kl_divergence"]):
        return ""
    return f"farther from the reference than {best.candidate.name} (KL divergence {theirs:.4f} and {ours:.4f})"


def _fastest(candidates: Sequence[Candidate]) -> Candidate:
    top = max(candidate.token_generation_throughput_tps for candidate in candidates)
    noise = 1 + NOISE["token_generation_throughput_tps"]
    level = [candidate for candidate in candidates if candidate.token_generation_throughput_tps * noise >= top]
    return min(level, key=lambda candidate: (candidate.size_bytes, candidate.name))


def _costlier(candidate: Candidate, chosen: Candidate) -> str:
    ours, theirs = chosen.token_generation_throughput_tps, candidate.token_generation_throughput_tps
    if theirs < ours:
        return f"slower ({theirs:,.1f} instead of {ours:,.1f} tok/s)"
    return "larger"


def _reason(
    chosen: Candidate, best: Judged, equals: Sequence[Candidate], front: Sequence[Judged], advantage: str
) -> str:
    if len(front) == 1:
        return f"{chosen.name} keeps the budget, and no other variant within the budget is better in any figure."
    if len(equals) == 1:
        return f"{chosen.name} has the best quality under the budget."
    quality = "answers as well as" if best.scores is not None else "is as close to the reference as"
    if chosen is best.candidate:
        return f"{chosen.name} has the best quality under the budget, and is the {advantage} among equals."
    return f"{chosen.name} {quality} {best.candidate.name} within the noise, and is the {advantage} of these."
