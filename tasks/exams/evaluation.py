"""The record of an evaluation, and the figures derived from its answers: scores, conformity, intervals, examples."""

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, FiniteFloat

from slmops.infra.genai.calls import AnsweredRow, Evaluated
from slmops.infra.records import later_field
from slmops.infra.reference.answers import RowId, Share
from slmops.infra.tool_calls.call import Form
from slmops.tasks.exams.estimates import Estimate, mean_score, paired_loss, weighted_mean
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.questions.output_format import OutputFormat, output_faults
from slmops.tasks.questions.patterns import MATCH_TIMEOUT_S
from slmops.tasks.questions.scoring import ToolCalls
from slmops.tasks.questions.tool_calls import ComparedCalls, category_of, compare_calls

MAX_WORST_EXAMPLES = 5


class EvaluatedRow(AnsweredRow):
    """A variant's answer to one row, with its scores.

    `exact_match` is None for rows of other scorers, the scores are None for rows without an expected answer, and the
    output faults (errors in an answer's form) are None without a fault or a required format.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    reference_answer: str | None = None
    category: str | None = None
    score: Share | None = None
    reference_score: Share | None = None
    output_fault: str | None = None
    reference_output_fault: str | None = None
    calls: ComparedCalls | None = later_field(None)
    reference_calls: ComparedCalls | None = later_field(None)
    enable_thinking: bool | None = later_field(None)


class CategoryScore(BaseModel):
    """Mean scores of the rows of one category."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    category: str
    rows: int
    score: Estimate
    reference_score: Estimate | None


class Evaluation(Evaluated):
    """A variant's answers and its distance from the reference.

    `score` and `reference_score` are the means over the rows with expected answers, `quality_loss` is the reference's
    score minus the variant's over the same rows; all are None without such rows or without a reference. The output
    conformities are shares of all answers. The intervals of agreement and divergence come from resampling rows; they
    are None for fewer than two rows with positions, or where a figure is not finite. `worst_examples` are rows whose
    reference scores higher than the variant, the largest loss first.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    rows: tuple[EvaluatedRow, ...]
    score: Estimate | None = None
    reference_score: Estimate | None = None
    quality_loss: Estimate | None = None
    categories: tuple[CategoryScore, ...] = ()
    output_conformity: Estimate | None = None
    reference_output_conformity: Estimate | None = None
    top1_agreement_interval: Estimate | None = None
    near_agreement_interval: Estimate | None = later_field(None)
    kl_divergence_interval: Estimate | None = None
    worst_examples: tuple[RowId, ...] = ()
    notes: tuple[str, ...] = ()
    rows_sha256: str
    wall_s: FiniteFloat
    peak_rss_bytes: int

    @property
    def has_reference(self) -> bool:
        """Whether the variant was compared with a source checkpoint."""
        return self.vocabulary.reference is not None

    @property
    def modes(self) -> Mapping[bool, "Evaluation"]:
        """The answers with thoughts (True) and without, each with its own figures, if every row is in such a mode.

        Perplexities and the largest divergences are left out, because rows do not have them.
        """
        found = {row.enable_thinking for row in self.rows}
        return {thinks: self._of(thinks) for thinks in (True, False)} if found == {True, False} else {}

    def _of(self, thinks: bool) -> "Evaluation":
        rows = [row for row in self.rows if row.enable_thinking is thinks]
        positions, finite = (sum(getattr(row, name) for row in rows) for name in ("positions", "finite_positions"))
        names = ("top1_agreement", "near_agreement", "kl_divergence")
        unknown = ("kl_divergence_p99", "perplexity", "reference_perplexity", "exact_match", "reference_exact_match")
        return self.model_copy(
            update={
                "positions": positions,
                "finite_logits": finite / max(1, positions),
                "empty_answers": sum(not row.answer.strip() for row in rows),
                **{name: _over_positions(rows, name) for name in names},
                **dict.fromkeys(unknown),
                **_figures(rows, has_format=self.output_conformity is not None),
            }
        )


def score_evaluation(
    evaluation: Evaluation,
    rows: Sequence[EvaluationRow],
    output_format: OutputFormat | None,
    form: Form | None = None,
) -> Evaluation:
    """Derive scores, conformity, intervals and examples from the answers and the rows' figures.

    `rows` are those that were evaluated, in the same order; `form` is that of the calls of tools in answers. If a
    pattern's match exceeds the time limit, the answer scores 0, and a note says so.
    """
    slow: list[str] = []
    answers = [row.answer for row in evaluation.rows]
    references = [row.reference_answer for row in evaluation.rows]
    calls, reference_calls = _calls(rows, answers, form), _calls(rows, references, form)
    scores, faults = _scores(rows, answers, calls, "variant", slow), _faults(output_format, answers)
    reference_scores = _scores(rows, references, reference_calls, "reference", slow)
    reference_faults = _faults(output_format, references)
    scored = [
        found.model_copy(
            update={
                "category": category_of(row),
                "score": score,
                "reference_score": reference_score,
                "output_fault": fault,
                "reference_output_fault": reference_fault,
                "calls": made,
                "reference_calls": reference_made,
                "enable_thinking": row.enable_thinking,
            }
        )
        for found, row, score, reference_score, fault, reference_fault, made, reference_made in zip(
            evaluation.rows,
            rows,
            scores,
            reference_scores,
            faults,
            reference_faults,
            calls,
            reference_calls,
            strict=True,
        )
    ]
    notes = []
    if slow:
        places = ", ".join(slow[:5]) + (f" and {len(slow) - 5} more" if len(slow) > 5 else "")
        notes = [f"A pattern did not finish within {MATCH_TIMEOUT_S:g} s, so the score is 0: {places}."]
    figures = _figures(scored, has_format=output_format is not None)
    return evaluation.model_copy(update={**figures, "notes": (*evaluation.notes, *notes)})


def _figures(rows: Sequence[EvaluatedRow], *, has_format: bool) -> dict[str, object]:
    """Return the fields of an evaluation that its scored rows determine."""
    compared = [row for row in rows if row.positions]
    weights = [row.positions for row in compared]
    return {
        "rows": tuple(rows),
        "score": _mean([row.score for row in rows]),
        "reference_score": _mean([row.reference_score for row in rows]),
        "quality_loss": _loss(rows),
        "categories": _categories(rows),
        "output_conformity": _mean([float(row.output_fault is None) for row in rows]) if has_format else None,
        "reference_output_conformity": _mean(_conforming_references(rows)) if has_format else None,
        "top1_agreement_interval": _over_rows([row.top1_agreement for row in compared], weights),
        "near_agreement_interval": _over_rows([row.near_agreement for row in compared], weights),
        "kl_divergence_interval": _over_rows([row.kl_divergence for row in compared], weights),
        "worst_examples": _worst_examples(rows),
    }


def text_scores(rows: Sequence[EvaluationRow], answers: Sequence[str]) -> list[float | None]:
    """Return the scores of answers to rows without tools; 0 for one whose pattern exceeds the time limit."""
    return _scores(rows, answers, [None] * len(answers), "", [])


def _scores(
    rows: Sequence[EvaluationRow],
    answers: Sequence[str | None],
    calls: Sequence[ComparedCalls | None],
    side: str,
    slow: list[str],
) -> list[float | None]:
    scores: list[float | None] = []
    for row, answer, made in zip(rows, answers, calls, strict=True):
        if isinstance(row.scorer, ToolCalls) or row.expected is None or answer is None:
            scores.append(made.score if made else None)
            continue
        try:
            scores.append(row.scorer.score(answer, row.expected))
        except TimeoutError:
            scores.append(0.0)
            slow.append(f"row {row.id!r} with the {side}'s answer")
    return scores


def _calls(
    rows: Sequence[EvaluationRow], answers: Sequence[str | None], form: Form | None
) -> list[ComparedCalls | None]:
    compared: list[ComparedCalls | None] = []
    for row, answer in zip(rows, answers, strict=True):
        made = None
        if form and answer is not None and row.expected_tool_calls is not None and isinstance(row.scorer, ToolCalls):
            tools = [tool.model_dump(mode="json") for tool in row.tools]
            made = compare_calls(row.scorer, form.parse(answer, tools), row.expected_tool_calls)
        compared.append(made)
    return compared


def _faults(output_format: OutputFormat | None, answers: Sequence[str | None]) -> list[str | None]:
    if output_format is None:
        return [None] * len(answers)
    found = iter(output_faults(output_format, [answer for answer in answers if answer is not None]))
    return [None if answer is None else next(found) for answer in answers]


def _conforming_references(rows: Sequence[EvaluatedRow]) -> list[float | None]:
    return [None if row.reference_answer is None else float(row.reference_output_fault is None) for row in rows]


def _mean(scores: Sequence[float | None]) -> Estimate | None:
    known = [score for score in scores if score is not None]
    return mean_score(known) if known else None


def _loss(rows: Sequence[EvaluatedRow]) -> Estimate | None:
    pairs = [
        (row.reference_score, row.score) for row in rows if row.reference_score is not None and row.score is not None
    ]
    return paired_loss(*zip(*pairs, strict=True)) if pairs else None


def _categories(rows: Sequence[EvaluatedRow]) -> tuple[CategoryScore, ...]:
    """Mean scores by category, in the order of their first rows; rows without a category or a score are left out."""
    members: dict[str, list[EvaluatedRow]] = {}
    for row in rows:
        if row.category is not None and row.score is not None:
            members.setdefault(row.category, []).append(row)
    return tuple(
        CategoryScore(
            category=category,
            rows=len(of_category),
            score=mean_score([row.score for row in of_category if row.score is not None]),
            reference_score=_mean([row.reference_score for row in of_category]),
        )
        for category, of_category in members.items()
    )


def _over_rows(values: Sequence[float | None], weights: Sequence[int]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return weighted_mean(known, weights) if len(known) == len(values) and len(known) > 1 else None


def _over_positions(rows: Sequence[EvaluatedRow], name: str) -> float | None:
    """Mean of a figure of rows over all their positions; None if a row lacks it."""
    known = [(getattr(row, name), row.positions) for row in rows if row.positions]
    if not known or any(value is None for value, _ in known):
        return None
    return math.fsum(value * positions for value, positions in known) / sum(positions for _, positions in known)


def _worst_examples(rows: Sequence[EvaluatedRow]) -> tuple[RowId, ...]:
    """Ids of the rows with the largest losses; of equal losses, those with the larger divergence from the reference."""
    losses = [
        (row.reference_score - row.score, math.inf if row.kl_divergence is None else row.kl_divergence, row.id)
        for row in rows
        if row.reference_score is not None and row.score is not None and row.reference_score > row.score
    ]
    losses.sort(key=lambda loss: loss[:2], reverse=True)
    return tuple(row_id for _, _, row_id in losses[:MAX_WORST_EXAMPLES])
