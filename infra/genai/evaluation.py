"""A model folder's answers and distributions in onnxruntime-genai, compared with those of the source checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slmops.infra.errors import StageFailed
from slmops.infra.genai.calls import AnsweredRow, Evaluate, Evaluated, TemplateMismatch, TemplateMismatches, Vocabulary
from slmops.infra.genai.runtime import NOTHING, Confirmed, GenaiModel, package_versions
from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import (
    ANSWERS_FILE,
    LOGITS_FILE,
    Question,
    SourceAnswer,
    SourceAnswers,
    choose_positions,
    matches,
    share_of,
)
from slmops.infra.reference.distributions import PositionComparison, are_comparable, compare_position
from slmops.infra.reference.repetition import ends_in_repetition
from slmops.infra.reference.thinking import Thinking, TokenCounter, split_tokens

# So many rows' answers are generated token by token. The others begin with what the pass over the reference's answer
# confirms, if such passes give the tokens of these rows: a model whose cache is broken generates others.
GENERATED_ROWS = 4


def evaluate(call: Evaluate, progress: Progress) -> Evaluated:
    """Answer questions greedily and compare the next-token distributions with the reference's.

    Prompts for the answers are rendered by the runtime itself; the distributions are teacher-forced over the
    reference's own token ids (without a reference: over the variant's own answers, only to check whether they are
    finite).

    A variant with another vocabulary than the reference is treated as if there were no reference, and `comparable` is
    false. If its tokenizer gives ids beyond its vocabulary, it cannot answer: then the answer is empty and has no
    positions.

    Raises `StageFailed` for a model that cannot be run, or a reference of other rows.
    """
    progress(0, len(call.rows), "loading the model")
    model = GenaiModel(
        call.model_dir, threads=call.threads, repetition_penalty=call.decoding.repetition_penalty, all_positions=True
    )
    reference = _Reference(call.reference_dir, call.rows) if call.reference_dir else None
    vocabulary = _vocabulary(model, reference)
    answers: list[_Answer] = []
    compared: list[_Followed] = []
    confirms = True
    for done, question in enumerate(call.rows):
        progress(done, 2 * len(call.rows), "answers")
        expected = reference.rows[done] if reference else None
        followed = _Followed()
        if reference and vocabulary.comparable:
            followed = reference.follow(model, done, vocabulary.compared, call.chunk_bytes)
        drafted = confirms and done >= GENERATED_ROWS
        answer = _answer(model, question, expected, vocabulary, call, followed.confirmed if drafted else NOTHING)
        confirms = confirms and (drafted or _confirms(followed.confirmed, answer, expected))
        answers.append(answer)
        compared.append(followed)
    finite: list[bool] = []
    rows: list[AnsweredRow] = []
    chosen = choose_positions([len(answer.token_ids) for answer in answers], call.max_positions)
    for done, (answer, followed) in enumerate(zip(answers, compared, strict=True)):
        progress(len(answers) + done, 2 * len(answers), "distributions")
        if reference and vocabulary.comparable:
            flags = [comparison.finite for comparison in followed.comparisons]
        else:
            flags = _finite_flags(model, answer.token_ids, chosen[done], call.chunk_bytes)
        finite += flags
        expected = reference.rows[done] if reference else None
        rows.append(_row(answer, expected, model, call.decoding.thinking, followed.comparisons, flags))
    found = [comparison for followed in compared for comparison in followed.comparisons]
    return Evaluated(
        rows=tuple(rows),
        template_mismatches=_template_mismatches(answers, reference),
        positions=len(finite),
        finite_logits=sum(finite) / max(1, len(finite)),
        top1_agreement=share_of([comparison.agrees for comparison in found]),
        near_agreement=share_of([comparison.nearly_agrees for comparison in found]),
        kl_divergence=_mean([comparison.kl_divergence for comparison in found]),
        kl_divergence_p99=_percentile([comparison.kl_divergence for comparison in found], 99),
        perplexity=_perplexity([comparison.log_probability for comparison in found]),
        reference_perplexity=_perplexity([comparison.reference_log_probability for comparison in found]),
        exact_match=share_of([row.exact_match for row in rows]),
        reference_exact_match=reference.exact_match if reference else None,
        identical_answers=share_of([row.identical_to_reference for row in rows]),
        empty_answers=sum(not row.answer.strip() for row in rows),
        vocabulary=vocabulary,
        threads=call.threads,
        versions=package_versions(),
    )


@dataclass(frozen=True)
class _Answer:
    """A variant's answer; `answer_ids` are None if it cannot process the prompt, `ended` if that is not known."""

    question: Question
    prompt: str
    prompt_ids: list[int]
    answer_ids: list[int] | None
    ended: bool | None

    @property
    def token_ids(self) -> list[int]:
        return [] if self.answer_ids is None else self.prompt_ids + self.answer_ids


@dataclass(frozen=True)
class _Followed:
    """The result of a pass over a row of the reference: its comparisons, and what of its answer is confirmed."""

    comparisons: Sequence[PositionComparison] = ()
    confirmed: Confirmed = NOTHING


def _confirms(confirmed: Confirmed, answer: _Answer, expected: SourceAnswer | None) -> bool:
    """Whether a pass over the reference's answer gives no other tokens than the model has generated."""
    if expected is None or answer.answer_ids is None or answer.prompt_ids != list(expected.prompt_ids):
        return False
    length = len(confirmed.token_ids)
    same = [*confirmed.token_ids] == answer.answer_ids[:length]
    return same and (not confirmed.ended or length == len(answer.answer_ids))


def _answer(
    model: GenaiModel,
    question: Question,
    expected: SourceAnswer | None,
    vocabulary: Vocabulary,
    call: Evaluate,
    confirmed: Confirmed,
) -> _Answer:
    prompt, prompt_ids = model.render(question.messages, question.tools, question.template_prefix)
    thinking = call.decoding.thinking
    budget = expected.max_new_tokens if expected else call.max_new_tokens + (thinking.max_tokens if thinking else 0)
    counter = None
    if thinking:
        opened = thinking.marks.is_opened_by(prompt)
        counter = TokenCounter(thinking, call.max_new_tokens, model.decode_all, opened=opened)
    if vocabulary.comparable:
        begun = confirmed if expected and prompt_ids == list(expected.prompt_ids) else NOTHING
        answer_ids, ended = model.answer_and_end(prompt_ids, budget, counter, begun)
        return _Answer(question, prompt, prompt_ids, answer_ids, ended)
    return _Answer(
        question, prompt, prompt_ids, *_answer_if_possible(model, vocabulary.variant, prompt_ids, budget, counter)
    )


def _row(
    answer: _Answer,
    expected: SourceAnswer | None,
    model: GenaiModel,
    thinking: Thinking | None,
    comparisons: Sequence[PositionComparison],
    finite: Sequence[bool],
) -> AnsweredRow:
    answer_ids = answer.answer_ids or []
    shown = model.decode_all if answer.question.keeps_control_tokens else model.decode
    text, thoughts = shown(answer_ids), None
    if thinking:
        opened = thinking.marks.is_opened_by(answer.prompt)
        parts = split_tokens(thinking.marks, answer_ids, opened=opened, whole=model.decode_all, shown=shown)
        text, thoughts = parts.text, parts.record
    return AnsweredRow(
        id=answer.question.id,
        answer=text,
        reference_answer=expected.answer if expected else None,
        exact_match=matches(text, answer.question.expected),
        identical_to_reference=answer_ids == model.without_end(expected.answer_ids) if expected else None,
        prompt_tokens=len(answer.prompt_ids),
        template_matches=answer.prompt_ids == list(expected.prompt_ids) if expected else None,
        positions=len(finite),
        finite_positions=sum(finite),
        top1_agreement=share_of([comparison.agrees for comparison in comparisons]),
        near_agreement=share_of([comparison.nearly_agrees for comparison in comparisons]),
        kl_divergence=_mean([comparison.kl_divergence for comparison in comparisons]),
        ended=answer.ended,
        reference_ended=expected.ended if expected else None,
        thoughts=thoughts,
        reference_thoughts=expected.thoughts if expected else None,
        repeats=not answer.ended and ends_in_repetition(answer_ids),
        reference_repeats=expected.repeats if expected else False,
    )


def _template_mismatches(answers: Sequence[_Answer], reference: "_Reference | None") -> TemplateMismatches:
    pairs = zip(answers, reference.rows, strict=True) if reference else ()
    differing = [(answer, row) for answer, row in pairs if answer.prompt_ids != list(row.prompt_ids)]
    example = None
    if differing:
        answer, row = differing[0]
        example = TemplateMismatch(
            id=row.id,
            reference=row.prompt,
            variant=answer.prompt,
            reference_ids=row.prompt_ids,
            variant_ids=tuple(answer.prompt_ids),
        )
    return TemplateMismatches(count=len(differing), example=example)


class _Reference:
    """The reference's tokens and logits, in the files of its child process."""

    def __init__(self, directory: Path, questions: Sequence[Question]) -> None:
        content = SourceAnswers.model_validate_json((directory / ANSWERS_FILE).read_bytes())
        self.rows, self.exact_match = content.rows, content.exact_match
        self.vocabulary_size = content.vocabulary_size
        self._tokenizer_size = content.tokenizer_size
        if [row.id for row in self.rows] != [question.id for question in questions]:
            raise StageFailed(
                f"The reference in {directory} was made for other evaluation rows.",
                "Make the reference again.",
                code="reference-of-other-rows",
            )
        self._logits_path = directory / LOGITS_FILE
        self._offsets = np.cumsum([0, *(len(row.positions) for row in self.rows)])

    def is_comparable(self, variant_size: int) -> bool:
        """See `are_comparable`."""
        return are_comparable(variant_size, self.vocabulary_size, self._tokenizer_size)

    def _logits(self, index: int) -> NDArray[np.float32]:
        """Read a row's logits; the pages of a file that stays mapped would count as memory of this process."""
        start, end = self._offsets[index : index + 2]
        logits: NDArray[np.float32] = np.array(np.load(self._logits_path, mmap_mode="r")[start:end])
        return logits

    def follow(self, model: GenaiModel, index: int, vocabulary: int, chunk_bytes: int) -> _Followed:
        """Compare a row at its positions, and find what of its answer the model confirms, in one pass."""
        row = self.rows[index]
        token_ids = row.prompt_ids + row.answer_ids
        expected = iter(self._logits(index))
        found: list[PositionComparison] = []

        def compare(position: int, logits: NDArray[np.float32]) -> None:
            reference = next(expected)[:vocabulary]
            found.append(compare_position(reference, logits[:vocabulary], token_ids[position + 1]))

        confirmed = model.follow(row.prompt_ids, row.answer_ids, row.positions, compare, chunk_bytes)
        return _Followed(found, confirmed)


def _vocabulary(model: GenaiModel, reference: _Reference | None) -> Vocabulary:
    try:
        size = model.vocabulary_size
    except StageFailed:
        declared = model.declared_vocabulary_size if reference else None
        if reference is None or declared is None or reference.is_comparable(declared):
            raise
        size = declared  # a model whose vocabulary is that small may not even start; this figure reports it
    comparable = reference is None or reference.is_comparable(size)
    return Vocabulary(
        variant=size,
        reference=reference.vocabulary_size if reference else None,
        compared=min(size, reference.vocabulary_size if reference else size) if comparable else 0,
        comparable=comparable,
    )


def _answer_if_possible(
    model: GenaiModel,
    vocabulary_size: int,
    prompt_ids: list[int],
    max_new_tokens: int,
    counter: TokenCounter | None,
) -> tuple[list[int] | None, bool | None]:
    """Return the answer of a model with another vocabulary as it does; None if it cannot process the prompt."""
    if max(prompt_ids, default=0) >= vocabulary_size:
        return None, None
    try:
        return model.answer_and_end(prompt_ids, max_new_tokens, counter)
    except StageFailed:
        return None, None


def _finite_flags(
    model: GenaiModel, token_ids: Sequence[int], positions: Sequence[int], chunk_bytes: int
) -> list[bool]:
    if not positions:
        return []
    return [bool(np.isfinite(logits).all()) for logits in model.logits_at(token_ids, positions, chunk_bytes)]


def _all_known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if known and len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = _all_known(values)
    return math.fsum(known) / len(known) if known else None


def _percentile(values: Sequence[float | None], percent: float) -> float | None:
    known = _all_known(values)
    return float(np.percentile(known, percent)) if known else None


def _perplexity(log_probabilities: Sequence[float | None]) -> float | None:
    """exp of the mean negative log-likelihood; None if unknown or too large for a float64."""
    mean = _mean(log_probabilities)
    return math.exp(-mean) if mean is not None and -mean < 700 else None
