"""Evaluation: a variant's answers and distributions, compared with those of its source checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.errors import BadInput
from slmops.infra.genai.calls import Evaluate
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.records import Json
from slmops.infra.reference.answers import Question, SourceAnswers
from slmops.infra.reference.decoding import PLAIN, Decoding
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.version import Variant, Version
from slmops.infra.transformers.calls import AnswerAsSource
from slmops.tasks.exams.evaluation import Evaluation, score_evaluation
from slmops.tasks.exams.exam import Bench
from slmops.tasks.exams.source import ComparedExam, has_source
from slmops.tasks.questions.evaluation_set import EvaluationRow, EvaluationSet, digest_of
from slmops.tasks.questions.output_format import OutputFormat
from slmops.tasks.questions.tool_prompts import check_switch, form_for, prompt_of, template_prefix_of
from slmops.tasks.workshop import Workshop

# Increased whenever the content of an evaluation's record changes: records with another number are not reused.
EVALUATION_SCHEMA = 2


def run_reference(
    settings: Settings,
    bench: Bench,
    rows: Sequence[EvaluationRow],
    torch_child: ChildProcess | None = None,
    decoding: Decoding | None = None,
) -> SourceAnswers:
    """Run the source checkpoint, the bench's model, on the rows; `bench.work` keeps what `evaluate_variant` needs.

    It is run within `torch_child`, if that is given.

    Raises `BadInput` for a row that the model cannot take, `StageFailed` and its kinds as `run_in_child` does.
    """
    return bench.run(
        AnswerAsSource(
            checkpoint_dir=bench.model,
            rows=questions_of(rows[: settings.evaluation.max_rows], read_chat_template(bench.model)),
            max_new_tokens=settings.evaluation.max_new_tokens,
            max_positions=settings.evaluation.max_positions,
            batch_size=settings.evaluation.batch_size,
            threads=settings.threads,
            output_dir=bench.work,
            decoding=decoding or PLAIN,
        ),
        settings.timeout.reference_s,
        within=torch_child,
    ).value


def evaluate_variant(
    settings: Settings,
    bench: Bench,
    rows: Sequence[EvaluationRow],
    *,
    reference_dir: Path | None,
    output_format: OutputFormat | None = None,
    decoding: Decoding | None = None,
) -> Evaluation:
    """Run a genai model folder, the bench's, on the rows in a child process, and score its answers.

    `reference_dir` is the work folder of `run_reference` for the same rows, or None for a model without a source
    checkpoint.

    Raises `StageFailed` and its kinds for a model that cannot be opened or run.
    """
    used, template = rows[: settings.evaluation.max_rows], read_chat_template(bench.model)
    child = bench.run(
        Evaluate(
            model_dir=bench.model,
            rows=questions_of(used, template),
            reference_dir=reference_dir,
            max_new_tokens=settings.evaluation.max_new_tokens,
            max_positions=settings.evaluation.max_positions,
            threads=settings.threads,
            decoding=decoding or PLAIN,
        ),
        settings.timeout.evaluate_s,
    )
    found = Evaluation(
        **child.value.model_dump(),
        rows_sha256=digest_of(used),
        wall_s=child.wall_s,
        peak_rss_bytes=child.peak_rss_bytes,
    )
    return score_evaluation(found, used, output_format, form_for(template, used))


def questions_of(rows: Sequence[EvaluationRow], template: str | None) -> tuple[Question, ...]:
    """Return the children's questions. Children know only the scorer exact_match.

    Raises `BadInput` for a row that turns thoughts on or off, if the chat template has no switch.
    """
    check_switch(template, rows)
    questions = []
    for row in rows:
        messages, tools = prompt_of(row, template)
        question = Question(
            id=row.id,
            messages=messages,
            expected=row.expected if row.scorer.name == "exact_match" else None,
            tools=tools,
            keeps_control_tokens=bool(row.tools),
            template_prefix=template_prefix_of(row, template),
        )
        questions.append(question)
    return tuple(questions)


EVALUATION = Kind("evaluation", Evaluation, field="evaluation")


class AnswersExam(ComparedExam[Evaluation]):
    """A variant's answers to the rows of an evaluation, compared with the answers of its source checkpoint.

    With `compared` False only the answers are needed, and a stored evaluation with a comparison counts too.
    """

    kind, name, done_before = EVALUATION, "evaluate", "evaluated before"
    source_name = "reference"

    def __init__(self, evaluation: EvaluationSet, *, compared: bool = True) -> None:
        self.evaluation = evaluation
        self.compared = compared

    def question(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.question`."""
        output_format = self.evaluation.output_format
        return {
            "schema": EVALUATION_SCHEMA,
            "variant": variant.digest,
            "source": variant.version.manifest.source.digest,
            "rows": digest_of(self.evaluation.rows),
            "output_format": output_format.model_dump(mode="json") if output_format else None,
            "settings": settings.evaluation.model_dump(mode="json"),
            **self._decoding(),
        }

    def record(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.record`."""
        return {"precision": variant.precision, **self.evaluation.model_dump(mode="json")}

    def source_question(self, source_digest: str, settings: Settings) -> Json:
        """See `ComparedExam.source_question`."""
        return {
            "source": source_digest,
            "rows": digest_of(self.evaluation.rows),
            "settings": settings.evaluation.model_dump(mode="json"),
            **self._decoding(),
        }

    def _decoding(self) -> Json:
        decoding = self.evaluation.decoding
        return {"decoding": decoding.model_dump(mode="json")} if decoding else {}

    def run_source(self, bench: Bench, shop: Workshop) -> None:
        """See `ComparedExam.run_source`."""
        run_reference(shop.settings, bench, self.evaluation.rows, shop.torch_child, self.evaluation.decoding)

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> Evaluation:
        """See `Exam.take`."""
        source = variant.version.manifest.source.digest
        has_reference = self.compared and has_source(variant)
        return evaluate_variant(
            shop.settings,
            bench,
            self.evaluation.rows,
            reference_dir=self.source_folder(source, shop.settings) if has_reference else None,
            output_format=self.evaluation.output_format,
            decoding=self.evaluation.decoding,
        )


def decoding_of(version: Version) -> Decoding | None:
    """Return the decoding of a version's last evaluation, or None for plain greedy decoding."""
    record = version.latest(Kind(EVALUATION.name, dict[str, object])) or {}
    return Decoding.model_validate(record["decoding"]) if record.get("decoding") else None


def last_evaluation_set(version: Version) -> EvaluationSet | None:
    """Return the rows and output format of a version's last evaluation, or None if it was never evaluated.

    Raises `BadInput` if they cannot be read, because another version of slmops recorded them.
    """
    record = version.latest(Kind(EVALUATION.name, dict[str, object]))
    if record is None:
        return None
    fields = {name: record[name] for name in EvaluationSet.model_fields if name in record}
    try:
        return EvaluationSet.model_validate(fields)
    except ValidationError as error:
        raise BadInput(
            f"The rows of {version.reference}'s last evaluation cannot be read: {error.errors()[0]['msg']}.",
            "Another version of slmops recorded them: name the evaluation file (--eval).",
            code="evaluation-record-unreadable",
        ) from error
