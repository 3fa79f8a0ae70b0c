"""The gate's checks of answers without an end: cut at the limit of tokens, in endless thoughts, or in a loop.

Endless repetition is what models of few bits are best known for. Each check compares the variant with its source
checkpoint row by row; what the source does too is noted.
"""

from collections.abc import Iterator
from typing import NamedTuple

from slmops.tasks.exams.estimates import Estimate, mean_score, paired_loss
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.verdict.checks import CheckName, GateCheck, beyond_noise


class Ends(NamedTuple):
    """Whether answers are as they should be, row by row, of the source checkpoint and of the variant."""

    of_source: list[bool]
    of_variant: list[bool]

    @property
    def failing_too(self) -> int:
        """The number of rows in which both are not."""
        return sum(not (source or variant) for source, variant in zip(*self, strict=True))


def ended_answers(evaluation: Evaluation) -> Ends:
    """Return whether answers ended within their limit of tokens, for the rows where both are known."""
    rows = [row for row in evaluation.rows if row.ended is not None and row.reference_ended is not None]
    return Ends([bool(row.reference_ended) for row in rows], [bool(row.ended) for row in rows])


def ended_thoughts(evaluation: Evaluation) -> Ends:
    """Return whether thoughts ended, for all rows if an answer of either has thoughts; one without has ended them."""
    rows = evaluation.rows if any(row.thoughts or row.reference_thoughts for row in evaluation.rows) else ()
    return Ends(
        [row.reference_thoughts is None or row.reference_thoughts.ended for row in rows],
        [row.thoughts is None or row.thoughts.ended for row in rows],
    )


def answers_without_loop(evaluation: Evaluation) -> Ends:
    """Return whether answers end in no loop, for all rows if an answer of either does."""
    rows = evaluation.rows if any(row.repeats or row.reference_repeats for row in evaluation.rows) else ()
    return Ends([not row.reference_repeats for row in rows], [not row.repeats for row in rows])


def of_endless(evaluation: Evaluation, allowed: float) -> Iterator[GateCheck]:
    """Yield the checks; each fails only if its whole interval is above the allowed share of rows."""
    checks: dict[CheckName, Ends] = {
        "ended_answers": ended_answers(evaluation),
        "ended_thoughts": ended_thoughts(evaluation),
        "repetition": answers_without_loop(evaluation),
    }
    for name, ends in checks.items():
        if ends.of_source:
            yield beyond_noise(name, paired_loss(*ends), allowed)


def notes_on_endless(evaluation: Evaluation) -> Iterator[str]:
    """Yield notes on endless answers that no check judges: those of the source, and those without one."""
    rows = len(evaluation.rows)
    looping, thinking = answers_without_loop(evaluation), ended_thoughts(evaluation)
    if not evaluation.has_reference:
        found = (looping.of_variant.count(False), thinking.of_variant.count(False))
    else:
        found = (looping.failing_too, thinking.failing_too)
    too = ", where the source checkpoint's do the same" if evaluation.has_reference else ""
    if found[0]:
        yield f"{found[0]} of {rows} answers end in a loop at their limit of tokens{too}."
    if found[1]:
        yield f"The thoughts of {found[1]} of {rows} answers do not end within their limit of tokens{too}."


class ThoughtFigures(NamedTuple):
    """Shares of the rows whose answers think, and of these whose thoughts end; mean length of thoughts, in tokens."""

    thinking: Estimate
    ended: Estimate
    tokens: float


def thought_figures(evaluation: Evaluation, *, of_source: bool) -> ThoughtFigures | None:
    """Return the figures of the thoughts of the variant or its source; None if no answer has any."""
    thoughts = [row.reference_thoughts if of_source else row.thoughts for row in evaluation.rows]
    known = [thought for thought in thoughts if thought]
    if not known:
        return None
    return ThoughtFigures(
        thinking=mean_score([float(thought is not None) for thought in thoughts]),
        ended=mean_score([float(thought.ended) for thought in known]),
        tokens=sum(thought.tokens for thought in known) / len(known),
    )
