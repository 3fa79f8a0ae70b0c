"""The output schema as a constraint: a variant's answers that must follow it, beside those that need not."""

from collections.abc import Sequence

from pydantic import FiniteFloat

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.errors import BadInput
from slmops.infra.genai.constraint_calls import AnswerBySchema, BoundAnswer, FindSchemaFault, TimedAnswer
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.records import Json, Record
from slmops.infra.reference.answers import RowId, Share
from slmops.infra.reference.decoding import PLAIN
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.exams.answers import questions_of
from slmops.tasks.exams.estimates import Estimate, mean_score
from slmops.tasks.exams.evaluation import text_scores
from slmops.tasks.exams.exam import Bench, Exam
from slmops.tasks.questions.evaluation_set import EvaluationRow, EvaluationSet, digest_of
from slmops.tasks.questions.output_format import OutputFormat, output_faults
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import Workshop, workshop

# Increased whenever the content of the record changes: records with another number are not reused.
CONSTRAINT_SCHEMA = 1


class JudgedAnswer(Record):
    """An answer's text, its score (None: the row expects no text), and what is wrong with its form (None: nothing)."""

    answer: str
    score: Share | None
    fault: str | None

    @property
    def is_well_formed_but_wrong(self) -> bool:
        """Whether nothing but the content is wrong, which no check of the form finds."""
        return self.fault is None and self.score is not None and self.score < 1


class AnswerPair(Record):
    """A row's answer bound by the schema, and the free one."""

    id: RowId
    free: JudgedAnswer
    bound: JudgedAnswer


class AnswerFigures(Record):
    """Shares of answers in the required form and of those that are well-formed but wrong, and their mean score.

    `tokens_per_s` are generated tokens by the time of their generation, `start_ms` the mean time before it, in which
    a grammar is made.
    """

    conformity: Estimate
    score: Estimate | None
    well_formed_but_wrong: Estimate | None
    tokens_per_s: FiniteFloat
    start_ms: FiniteFloat


class Constraint(Record):
    """A variant's answers with the output schema as a grammar and without, with the figures of both."""

    rows: tuple[AnswerPair, ...]
    free: AnswerFigures
    bound: AnswerFigures
    wall_s: FiniteFloat

    @property
    def cost(self) -> float:
        """The share of the tokens per second that the constraint takes."""
        return 1 - self.bound.tokens_per_s / self.free.tokens_per_s if self.free.tokens_per_s else 0.0


CONSTRAINT = Kind("constraint", Constraint, field="constraint")


class ResponseFormat(Record):
    """The JSON Schema of a version's answers to requests that name no other format."""

    json_schema: Json


RESPONSE_FORMAT = Kind("response-format", ResponseFormat)


class ConstraintExam(Exam[Constraint]):
    """A variant's answers to an evaluation's rows without tools, with its output schema as a grammar and without."""

    kind, name, done_before = CONSTRAINT, "constrain", "constrained before"

    def __init__(self, evaluation: EvaluationSet) -> None:
        self.evaluation = evaluation
        self.schema = schema_of(evaluation)
        self.rows = [row for row in evaluation.rows if not row.tools]

    def question(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.question`."""
        decoding = self.evaluation.decoding
        return {
            "schema": CONSTRAINT_SCHEMA,
            "variant": variant.digest,
            "rows": digest_of(self.rows),
            "json_schema": self.schema,
            "max_new_tokens": settings.evaluation.max_new_tokens,
            "threads": settings.threads,
            "decoding": decoding.model_dump(mode="json") if decoding else None,
        }

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> Constraint:
        """See `Exam.take`."""
        settings = shop.settings
        child = bench.run(
            AnswerBySchema(
                model_dir=bench.model,
                rows=questions_of(self.rows, read_chat_template(bench.model)),
                json_schema=self.schema,
                max_new_tokens=settings.evaluation.max_new_tokens,
                threads=settings.threads,
                decoding=self.evaluation.decoding or PLAIN,
            ),
            settings.timeout.evaluate_s,
        )
        form = OutputFormat(json_schema=self.schema)
        free, bound = (_judged(form, self.rows, texts) for texts in _texts(child.value))
        pairs = zip(self.rows, free, bound, strict=True)
        return Constraint(
            rows=tuple(AnswerPair(id=row.id, free=one, bound=other) for row, one, other in pairs),
            free=_figures(free, [answer.free for answer in child.value]),
            bound=_figures(bound, [answer.bound for answer in child.value]),
            wall_s=child.wall_s,
        )


def has_schema(evaluation: EvaluationSet) -> bool:
    """Whether an evaluation's output format is a schema that can be a constraint."""
    return evaluation.output_format is not None and isinstance(evaluation.output_format.json_schema, dict)


def schema_of(evaluation: EvaluationSet) -> Json:
    """Return the output schema of an evaluation; raises `BadInput` if it has none that could be a constraint."""
    form = evaluation.output_format
    if form is None or not isinstance(form.json_schema, dict):
        found = "nothing" if form is None else form.summary
        raise BadInput(
            f"Answers are to be constrained by a JSON Schema, and the output format is {found}.",
            "Name one (--output-schema FILE), or leave out --constrain.",
            code="constraint-without-schema",
        )
    return form.json_schema


@stage("check constraint", run_name="check-constraint")
def check_constraint(evaluation: EvaluationSet) -> None:
    """Raise `BadInput` if an evaluation's output schema cannot be a grammar of the runtime, or no row can follow it."""
    schema, settings = schema_of(evaluation), workshop().settings
    if all(row.tools for row in evaluation.rows):
        raise BadInput(
            "Answers are to be constrained, and every evaluation row has tools, whose calls have a form of their own.",
            "Add rows without tools, or leave out --constrain.",
            code="constraint-without-rows",
        )
    with work_folder(settings) as work:
        faults = run_in_child(
            FindSchemaFault(json_schema=schema),
            deadline_s=settings.timeout.render_s,
            log_path=work / "schema.log",
            work_dir=work,
        ).value
    if faults:
        raise BadInput(
            f"The output schema cannot be a constraint: {faults[0]}.",
            "Write the schema without what the runtime's grammar lacks, or leave out --constrain.",
            code="schema-without-grammar",
        )


@stage("record response format", run_name="response-format-{version.name}")
def record_response_format(version: Version, evaluation: EvaluationSet) -> None:
    """Make an evaluation's output schema the default form of a version's answers, unless it is already."""
    found = ResponseFormat(json_schema=schema_of(evaluation))
    if version.latest(RESPONSE_FORMAT) != found:
        version.record(RESPONSE_FORMAT, found)


def _texts(answers: Sequence[BoundAnswer]) -> tuple[list[str], list[str]]:
    return [answer.free.answer for answer in answers], [answer.bound.answer for answer in answers]


def _judged(form: OutputFormat, rows: Sequence[EvaluationRow], answers: Sequence[str]) -> list[JudgedAnswer]:
    scores, faults = text_scores(rows, answers), output_faults(form, answers)
    return [
        JudgedAnswer(answer=answer, score=score, fault=fault)
        for answer, score, fault in zip(answers, scores, faults, strict=True)
    ]


def _figures(answers: Sequence[JudgedAnswer], timed: Sequence[TimedAnswer]) -> AnswerFigures:
    scored = [answer for answer in answers if answer.score is not None]
    seconds = sum(answer.seconds for answer in timed)
    return AnswerFigures(
        conformity=mean_score([float(answer.fault is None) for answer in answers]),
        score=mean_score([answer.score for answer in scored if answer.score is not None]) if scored else None,
        well_formed_but_wrong=mean_score([float(answer.is_well_formed_but_wrong) for answer in scored])
        if scored
        else None,
        tokens_per_s=sum(answer.new_tokens for answer in timed) / seconds if seconds else 0.0,
        start_ms=sum(answer.start_ms for answer in timed) / len(timed),
    )
