"""The scorer tool_calls: an answer's calls compared with the expected ones, and its figures.

Names are compared, and arguments as JSON values: the order of keys does not count, and 1 is 1.0. The order of parallel
calls does not count, their number does. The categories are those of the Berkeley Function Calling Leaderboard (Patil
et al. 2025), and as there, an answer is right only if all its calls are.
"""

from collections.abc import Callable, Sequence

from pydantic import JsonValue

from slmops.infra.records import Record
from slmops.infra.tool_calls.call import AnsweredCalls, ToolCall
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.questions.scoring import ToolCalls, is_same_json, normalized


class ComparedCalls(Record):
    """An answer's calls beside the expected ones, of which there were `due`.

    `right` of them were made, `changed` with other arguments, and `lost` not at all; `invented` calls were not due, or
    are no readable call.
    """

    calls: tuple[ToolCall, ...]
    due: int
    right: int
    changed: int
    lost: int
    invented: int

    @property
    def score(self) -> float:
        """1 if every call that is due was made, and no other."""
        return float(not (self.changed or self.lost or self.invented))


def compare_calls(scorer: ToolCalls, found: AnsweredCalls, expected: Sequence[ToolCall]) -> ComparedCalls:
    """Pair an answer's calls with the expected ones: equal calls first, then those of the same tool."""
    same_name, is_equal = (lambda made, due: made.name == due.name), _equality(scorer.free_text)
    rest, missing = _unpaired(found.calls, expected, is_equal)
    others, lost = _unpaired(rest, missing, same_name)
    return ComparedCalls(
        calls=found.calls,
        due=len(expected),
        right=len(expected) - len(missing),
        changed=len(missing) - len(lost),
        lost=len(lost),
        invented=len(others) + found.malformed,
    )


def category_of(row: EvaluationRow) -> str | None:
    """Return a row's category: its own, else for tools that of the leaderboard."""
    if row.category is not None or row.expected_tool_calls is None:
        return row.category
    if any(message.role in ("assistant", "tool") for message in row.messages):
        return "multi_turn"
    if len(row.expected_tool_calls) == 0:
        return "irrelevance"
    parallel, multiple = len(row.expected_tool_calls) > 1, len(row.tools) > 1
    return {(0, 0): "simple", (0, 1): "multiple", (1, 0): "parallel", (1, 1): "parallel_multiple"}[parallel, multiple]


def _unpaired(
    made: Sequence[ToolCall], due: Sequence[ToolCall], is_pair: Callable[[ToolCall, ToolCall], bool]
) -> tuple[list[ToolCall], list[ToolCall]]:
    rest, missing = list(made), []
    for call in due:
        pair = next((index for index, other in enumerate(rest) if is_pair(other, call)), None)
        if pair is None:
            missing.append(call)
        else:
            del rest[pair]
    return rest, missing


def _equality(free_text: Sequence[str]) -> Callable[[ToolCall, ToolCall], bool]:
    def comparable(call: ToolCall) -> dict[str, JsonValue]:
        return {
            key: normalized(value) if key in free_text and isinstance(value, str) else value
            for key, value in call.arguments.items()
        }

    def is_equal(made: ToolCall, due: ToolCall) -> bool:
        return made.name == due.name and is_same_json(comparable(made), comparable(due))

    return is_equal
