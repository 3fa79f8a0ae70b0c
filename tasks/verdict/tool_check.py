"""The gate's tool check: by how much more often a variant's calls of tools are wrong than its source checkpoint's."""

from collections.abc import Callable, Iterator, Sequence

from slmops.tasks.exams.estimates import Estimate, mean_score, paired_loss
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.questions.tool_calls import ComparedCalls
from slmops.tasks.verdict.checks import CheckName, GateCheck, beyond_noise

Holds = Callable[[ComparedCalls], bool]

FAULTS: dict[CheckName, Holds] = {
    "tool_calls_lost": lambda made: made.lost > 0,
    "tool_calls_invented": lambda made: made.invented > 0,
    "tool_arguments_changed": lambda made: made.changed > 0,
}


def fault_shares(evaluation: Evaluation) -> dict[CheckName, Estimate]:
    """Return by how much the share of rows with each fault is above the source's, over the same rows."""
    pairs = [(row.reference_calls, row.calls) for row in evaluation.rows]
    known = [(of_source, made) for of_source, made in pairs if of_source and made]
    if not known:
        return {}
    return {
        name: paired_loss(
            [not is_faulty(of_source) for of_source, _ in known], [not is_faulty(made) for _, made in known]
        )
        for name, is_faulty in FAULTS.items()
    }


def of_tools(evaluation: Evaluation, allowed: float) -> Iterator[GateCheck]:
    """Yield the checks; each fails only if its whole interval is above the allowed share of rows."""
    for name, figure in fault_shares(evaluation).items():
        yield beyond_noise(name, figure, allowed)


def right_functions(made: Sequence[ComparedCalls]) -> Estimate | None:
    """Share of the rows with calls due in which the right functions, and no others, were called."""
    return _share([not (calls.lost or calls.invented) for calls in made if calls.due])


def right_arguments(made: Sequence[ComparedCalls]) -> Estimate | None:
    """Share of the rows with calls due in which no call has other arguments, where the functions are right."""
    return _share([not calls.changed for calls in made if calls.due and not (calls.lost or calls.invented)])


def right_silence(made: Sequence[ComparedCalls]) -> Estimate | None:
    """Share of the rows without a call due in which none was made."""
    return _share([not calls.invented for calls in made if not calls.due])


def _share(flags: Sequence[bool]) -> Estimate | None:
    return mean_score([float(flag) for flag in flags]) if flags else None
