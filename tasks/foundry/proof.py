"""Proof: a registered variant answers in a fresh process, as it did when it was evaluated."""

from pydantic import BaseModel, ConfigDict

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.errors import StageFailed
from slmops.infra.foundry.calls import Prove, ProvenAnswer
from slmops.infra.foundry.command import seen_by_command
from slmops.infra.genai.calls import AnsweredRow, Generate
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.reasoning import ThoughtMarks
from slmops.infra.records import later_field
from slmops.infra.reference.thinking import Thinking
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.version import Variant
from slmops.tasks.foundry.ids import model_id_of
from slmops.tasks.foundry.registration import ask_foundry, unregister_variant
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage


class Proof(BaseModel):
    """A registered variant's answer in a separate process; times in ms.

    `marks` are those of the thoughts that the runtime may give as a part of the answer.
    """

    model_config = ConfigDict(frozen=True)

    model_id: str
    question: str
    answer: str
    load_ms: float
    e2e_latency_ms: float
    prompt_tokens: int
    completion_tokens: int
    notes: tuple[str, ...] = ()
    marks: ThoughtMarks | None = later_field(None)

    @property
    def text(self) -> str:
        """The answer without thoughts that it begins with."""
        return self.marks.split(self.answer, opened=False).text if self.marks else self.answer

    def has_answer(self, answer: str) -> bool:
        """Whether an answer is the recorded one, with or without thoughts."""
        return not _texts(answer, self.marks).isdisjoint(_texts(self.answer, self.marks))


def proof_of(precision: str) -> Kind[Proof]:
    """Return the kind of evidence for the proofs of a precision."""
    return Kind(f"proof-{precision}", Proof)


@stage("prove variant", run_name="prove-{variant.precision}")
def prove_variant(
    variant: Variant, row: EvaluationRow, evaluated: AnsweredRow | None, thinking: Thinking | None, settings: Settings
) -> Proof:
    """Let a registered variant answer in a fresh process, and compare with onnxruntime-genai's own answer.

    `evaluated` is the answer of the evaluation, or None if the row was not evaluated; `thinking` is the model's. The
    answers are compared without their thoughts.

    A variant that is not found, does not load or gives another answer is unregistered again. Raises `StageFailed`. If
    the `foundry` command serves this cache, its answer is checked too. Because it renders prompts in its own way, the
    result is only a note.
    """
    model_id, marks = model_id_of(variant), thinking.marks if thinking else None
    messages = [message.model_dump() for message in row.messages]
    max_new_tokens = _max_new_tokens(evaluated, thinking, settings)
    call = Prove(cache_dir=settings.foundry_dir, model_id=model_id, messages=messages, max_new_tokens=max_new_tokens)
    with stage_progress(f"prove {variant.precision}") as on_progress:
        try:
            expected = _expected_texts(variant, call, evaluated, marks, settings)
            proven = ask_foundry(call, settings, on_progress)
            if expected.isdisjoint(_texts(proven.answer, marks)):
                raise StageFailed(
                    f"Through Foundry Local {model_id} answers {proven.answer!r}, "
                    f"onnxruntime-genai with the same model {' or '.join(map(repr, sorted(expected)))}.",
                    "Check whether both render its chat template alike (the evaluation's template mismatches).",
                    code="foundry-answers-differently",
                )
        except StageFailed as error:
            unregister_variant(variant, settings)
            # This is no passing fault, because another attempt would find no registered model.
            raise StageFailed(f"{error.message} It was unregistered again.", error.what_to_do, error.code) from error
        question = row.messages[-1].content
        note = seen_by_command(settings.foundry_dir, model_id, question, settings.timeout.foundry_s)
        notes = (note,) if note else ()
        proof = _proof(proven, question, marks, notes)
        variant.version.record(proof_of(variant.precision), proof)
    return proof


@stage("repeat proof", run_name="prove-{variant.precision}")
def repeat_proof(variant: Variant, row: EvaluationRow, recorded: Proof, settings: Settings) -> Proof:
    """Let a registered variant answer the row of a recorded proof in a fresh process, and compare the answers.

    Raises `StageFailed` when it is not found, does not load or gives another answer.
    """
    model_id = model_id_of(variant)
    messages = [message.model_dump() for message in row.messages]
    # The length of the recorded answer, not the present limit, because another limit may have cut that answer.
    max_new_tokens = max(recorded.completion_tokens, 1)
    call = Prove(cache_dir=settings.foundry_dir, model_id=model_id, messages=messages, max_new_tokens=max_new_tokens)
    with stage_progress(f"prove {variant.precision}") as on_progress:
        proven = ask_foundry(call, settings, on_progress)
    if not recorded.has_answer(proven.answer):
        raise StageFailed(
            f"Through Foundry Local {model_id} answers {proven.answer!r}, "
            f"and when it was proven it answered {recorded.answer!r}.",
            "slmops verify checks its files; slmops regate judges and proves the version again.",
            code="foundry-answers-differently",
        )
    return _proof(proven, recorded.question, recorded.marks)


def _proof(
    proven: ProvenAnswer, question: str, marks: ThoughtMarks | None = None, notes: tuple[str, ...] = ()
) -> Proof:
    return Proof(
        model_id=proven.model_id,
        question=question,
        answer=proven.answer,
        load_ms=proven.load_ms,
        e2e_latency_ms=proven.e2e_latency_ms,
        prompt_tokens=proven.prompt_tokens,
        completion_tokens=proven.completion_tokens,
        notes=notes,
        marks=marks,
    )


def last_proof(variant: Variant, row: EvaluationRow) -> Proof | None:
    """Return the last proof of a variant if it used this row."""
    proof = variant.version.latest(proof_of(variant.precision))
    return proof if proof and proof.question == row.messages[-1].content else None


def _max_new_tokens(evaluated: AnsweredRow | None, thinking: Thinking | None, settings: Settings) -> int:
    """Return how many tokens Foundry's answer may have, so that it ends where the evaluated one does."""
    most = settings.evaluation.max_new_tokens
    if evaluated is None or evaluated.thoughts is None:
        return most + (thinking.max_tokens if thinking and evaluated is None else 0)
    return evaluated.thoughts.tokens + (most if evaluated.thoughts.ended else 0)


def _texts(answer: str, marks: ThoughtMarks | None) -> set[str]:
    """Return an answer's text without thoughts; another one if its prompt may have the start mark of the thoughts."""
    if marks is None:
        return {answer.strip()}
    return {marks.split(answer, opened=opened).text for opened in {False, marks.end in answer}}


def _expected_texts(
    variant: Variant, asked: Prove, evaluated: AnsweredRow | None, marks: ThoughtMarks | None, settings: Settings
) -> set[str]:
    """Return genai's answer with the repetition penalty of the model's own configuration, as Foundry uses it.

    The evaluation's answers have no penalty; they are the same if the model sets none. Thoughts without an end, whose
    start mark is in the prompt, may be all that Foundry gives as the answer.
    """
    with work_folder(settings) as work:
        variant.place(work / "model")
        search = read_json(work / "model" / "genai_config.json").get("search", {})
        penalty = float(search.get("repetition_penalty", 1.0))
        if penalty == 1.0 and evaluated is not None:
            endless = evaluated.thoughts if evaluated.thoughts and not evaluated.thoughts.ended else None
            return {evaluated.answer.strip(), *([endless.text] if endless else [])}
        child = run_in_child(
            Generate(
                model_dir=work / "model",
                messages=asked.messages,
                max_new_tokens=asked.max_new_tokens,
                threads=settings.threads,
                repetition_penalty=penalty,
            ),
            deadline_s=settings.timeout.evaluate_s,
            log_path=settings.cache_dir / "logs" / "generate.log",
            work_dir=work,
        )
    return _texts(child.value.answer, marks)
