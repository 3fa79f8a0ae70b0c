"""Calls of child processes on a JSON Schema as the grammar of answers, and their answers."""

from pydantic import FiniteFloat

from slmops.infra.genai.calls import OnModel
from slmops.infra.process.call import Call, Progress
from slmops.infra.records import Json, Record
from slmops.infra.reference.answers import Question, RowId
from slmops.infra.reference.decoding import PLAIN, Decoding


class TimedAnswer(Record):
    """A greedy answer, the number of its tokens with the end token, and the time of their generation.

    `start_ms` is the time before the prompt is processed, in which a grammar is made. Thoughts are left out of the
    text, and count as tokens.
    """

    answer: str
    new_tokens: int
    seconds: FiniteFloat
    start_ms: FiniteFloat


class BoundAnswer(Record):
    """A question's answer `bound` by a schema, and the `free` one."""

    id: RowId
    free: TimedAnswer
    bound: TimedAnswer


class AnswerBySchema(OnModel[tuple[BoundAnswer, ...]]):
    """Answer questions with a JSON Schema as the answers' grammar, and without; see `Evaluate` for the limits.

    With the schema, answers have no thoughts: it is the form of the whole answer.
    """

    rows: tuple[Question, ...]
    json_schema: Json
    max_new_tokens: int
    decoding: Decoding = PLAIN

    def perform(self, progress: Progress) -> tuple[BoundAnswer, ...]:
        """See `slmops.infra.genai.constraint.answer_by_schema`."""
        from slmops.infra.genai.constraint import answer_by_schema

        return answer_by_schema(self, progress)


class FindSchemaFault(Call[tuple[str, ...]]):
    """Return why the runtime makes no grammar of a JSON Schema; nothing if it does."""

    json_schema: Json

    def perform(self, progress: Progress) -> tuple[str, ...]:
        """See `slmops.infra.genai.constraint.schema_fault`."""
        from slmops.infra.genai.constraint import schema_fault

        return schema_fault(self, progress)
