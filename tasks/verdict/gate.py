"""The gate: it decides from measurements whether a variant may be served."""

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from prefect import get_run_logger

from slmops.infra.records import Record, later_field
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.version import Variant
from slmops.tasks.exams.endurance import Endurance
from slmops.tasks.exams.estimates import Estimate, mean_score, paired_loss
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.length_sweep import LengthSweep
from slmops.tasks.exams.template_parity import TemplateParity
from slmops.tasks.exams.text import TextComparison
from slmops.tasks.runs.stage import stage
from slmops.tasks.verdict.checks import (
    CheckName,
    GateCheck,
    at_least,
    at_least_beyond_noise,
    at_most,
    beside_near_ties,
    beyond_noise,
    no_fault,
)
from slmops.tasks.verdict.endless_check import ended_answers, notes_on_endless, of_endless
from slmops.tasks.verdict.thresholds import GateThresholds
from slmops.tasks.verdict.tool_check import of_tools


class GateVerdict(Record):
    """The gate's decision: passed when every check passed or was allowed to fail.

    `decided_by` says whether the task score or the distributions decided on the quality; None without a reference.
    `notes` report what could not be judged, and anomalies; `warnings` are important for the user.
    """

    passed: bool
    checks: tuple[GateCheck, ...]
    decided_by: Literal["score", "distributions"] | None = later_field(None)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = later_field(())

    @property
    def failed_checks(self) -> tuple[GateCheck, ...]:
        """The checks that prevent the variant from being served."""
        return tuple(check for check in self.checks if check.rejects)

    @property
    def allowed_checks(self) -> tuple[GateCheck, ...]:
        """The checks that failed and that the user allowed to fail."""
        return tuple(check for check in self.checks if check.allowed)


def judge(
    evaluation: Evaluation,
    thresholds: GateThresholds,
    *,
    length_sweep: LengthSweep | None = None,
    parity: TemplateParity | None = None,
    text: TextComparison | None = None,
    endurance: Sequence[Endurance] = (),
    allow: Collection[str] = (),
) -> GateVerdict:
    """Decide whether a variant may be registered. Figures that were not measured are not judged.

    Against the source checkpoint, where there is one: the same `vocabulary`, `top1_agreement` (at least) and
    `kl_divergence` (at most) on the evaluation set and on the user's text, and `quality_loss`: the reference's score
    minus the variant's on the same rows (at most). A loss counts as failed only when its interval lies beyond the
    threshold, as passed when it lies within, and is not decided otherwise; so does an agreement, which is a share of
    positions, also if it lies within only when near ties count as agreement; then the divergence decides. Where the
    score decides (`score_decides`), the distributions only have to be those of a model that is not broken.
    `ended_answers`: by how much fewer answers come to their end than the source's, within the tokens that they may have
    (at most, judged as a loss is); `ended_thoughts` and `repetition` are the same for thoughts that come to their end,
    and for answers without a loop at their end. `tool_calls_lost`, `tool_calls_invented` and `tool_arguments_changed`:
    by how many more rows have such a fault than with the source (at most the allowed loss, judged as that is).

    Of the variant: `finite_logits` (all), `output_format` (share of answers, at least; an answer without it is excused
    where the source's has it neither), `non_empty_answers` (all; only without a reference), `template_parity`
    (differences, none), `memory_growth_*` (bytes per request, at most, failed only when its interval lies beyond),
    `valid_lengths` (prompt lengths without a valid answer, none; see `LengthSweep`), `steadiness` (largest loss of
    throughput from one prompt length to the next, at most), `edge_input_*` (inputs that ended in a crash or left the
    runtime unusable, none).

    Answers with thoughts and answers without are judged apart, if every row was asked in one of these modes.

    A check that is named by `allow` may fail.
    """
    modes: list[tuple[bool | None, Evaluation]] = [*evaluation.modes.items()] or [(None, evaluation)]
    by_score = all(score_decides(found, thresholds) for _, found in modes)
    limits = thresholds.where_the_score_decides if by_score else thresholds
    checks = [
        check.model_copy(update={"thinking": thinking})
        for thinking, found in modes
        for check in (*_against_reference(found, limits), *_of_answers(found, limits))
    ]
    if text is not None:
        checks += _on_text(text, limits)
    if parity is not None:
        checks.append(_of_templates(parity))
    if length_sweep is not None:
        checks += _of_lengths(length_sweep, limits)
    for in_runtime in endurance:
        checks += _of_endurance(in_runtime, limits)
    checks = [
        check.model_copy(update={"allowed": True}) if check.rejects and check.name in allow else check
        for check in checks
    ]
    distributions = "distributions" if evaluation.has_reference else None
    decisions = [note for _, found in modes for note in _on_what_decided(found, thresholds, by_score=by_score)]
    return GateVerdict(
        passed=not any(check.rejects for check in checks),
        checks=tuple(checks),
        decided_by="score" if by_score else distributions,
        notes=(*_notes(evaluation, checks), *dict.fromkeys(decisions)),
        warnings=tuple(_warnings(evaluation, checks, limits)),
    )


def score_decides(evaluation: Evaluation, thresholds: GateThresholds) -> bool:
    """Whether there are enough rows for the task score to decide on a variant's quality.

    This holds if the interval of the loss is completely on one side of the allowed loss (a test of non-inferiority with
    that margin: CPMP/EWP/482/99, Points to consider on switching between superiority and non-inferiority, 2000), and if
    the rows can detect a failure: a model with only wrong answers would lose more than is allowed, beyond noise (assay
    sensitivity, ICH E10, Choice of control group, 2000, section 1.5). Rows with a wrong answer of the source itself
    cannot.
    """
    if evaluation.quality_loss is None or not evaluation.vocabulary.comparable:
        return False
    if not beyond_noise("quality_loss", evaluation.quality_loss, thresholds.max_quality_loss).decided:
        return False
    scored = [row.reference_score for row in evaluation.rows if row.score is not None]
    reference = [score for score in scored if score is not None]
    return bool(reference) and paired_loss(reference, [0.0] * len(reference)).low > thresholds.max_quality_loss


def _against_reference(evaluation: Evaluation, thresholds: GateThresholds) -> list[GateCheck]:
    if not evaluation.has_reference:
        return []
    vocabulary = evaluation.vocabulary
    if not vocabulary.comparable:
        detail = f"{vocabulary.variant} tokens, the reference {vocabulary.reference}"
        return [no_fault("vocabulary", [detail])]
    checks = [
        _agreement(
            "top1_agreement",
            thresholds,
            (evaluation.top1_agreement, evaluation.top1_agreement_interval),
            (evaluation.near_agreement, evaluation.near_agreement_interval),
        ),
        at_most(
            "kl_divergence", evaluation.kl_divergence, thresholds.max_kl_divergence, evaluation.kl_divergence_interval
        ),
    ]
    if evaluation.quality_loss is not None:
        checks.append(beyond_noise("quality_loss", evaluation.quality_loss, thresholds.max_quality_loss))
    checks += of_tools(evaluation, thresholds.max_quality_loss)
    checks += of_endless(evaluation, thresholds.max_unended_answers)
    return checks


Measured = tuple[float | None, Estimate | None]  # a figure and its interval


def _agreement(name: CheckName, thresholds: GateThresholds, strict: Measured, near: Measured) -> GateCheck:
    limit = thresholds.min_top1_agreement
    first, second = (at_least_beyond_noise(name, value, limit, interval) for value, interval in (strict, near))
    return beside_near_ties(first, second)


def _of_answers(evaluation: Evaluation, thresholds: GateThresholds) -> list[GateCheck]:
    checks = [at_least("finite_logits", evaluation.finite_logits, 1.0)]
    if not evaluation.has_reference:
        answered = 1 - evaluation.empty_answers / len(evaluation.rows)
        checks.append(at_least("non_empty_answers", answered, 1.0))
    conformity = evaluation.output_conformity
    if conformity is not None:
        if thresholds.source_excuses_output and _formless_as_the_source(evaluation):
            conformity = mean_score(
                [float(row.output_fault is None or row.reference_output_fault is not None) for row in evaluation.rows]
            )
        checks.append(at_least("output_format", conformity.value, thresholds.min_output_conformity, conformity))
    return checks


def _formless_as_the_source(evaluation: Evaluation) -> int:
    """Count the rows in which neither the variant's nor the source's answer has the output format."""
    return sum(row.output_fault is not None and row.reference_output_fault is not None for row in evaluation.rows)


def _on_text(text: TextComparison, thresholds: GateThresholds) -> list[GateCheck]:
    if text.reference_perplexity is None:
        return []
    top1, near, divergence = (
        (estimate.value if estimate else None, estimate)
        for estimate in (text.top1_agreement, text.near_agreement, text.kl_divergence)
    )
    return [
        _agreement("text_top1_agreement", thresholds, top1, near),
        at_most("text_kl_divergence", divergence[0], thresholds.max_kl_divergence, divergence[1]),
    ]


def _of_templates(parity: TemplateParity) -> GateCheck:
    mismatches = [f"{mismatch.runtime} renders {mismatch.conversation!r} differently" for mismatch in parity.mismatches]
    broken = [f"{token} is not one token" for token in parity.broken_control_tokens]
    check = no_fault("template_parity", [*mismatches, *broken])
    return check.model_copy(update={"detail": parity.cause}) if parity.cause else check


def _of_lengths(length_sweep: LengthSweep, thresholds: GateThresholds) -> Iterator[GateCheck]:
    yield no_fault("valid_lengths", [f"{length} tokens" for length in length_sweep.invalid_prompt_tokens])
    if length_sweep.worst_cliff_ratio is not None:
        cliff = at_most("steadiness", length_sweep.worst_cliff_ratio, thresholds.max_cliff_ratio)
        yield cliff.model_copy(update={"detail": f"at {length_sweep.worst_cliff_prompt_tokens} prompt tokens"})


def _of_endurance(endurance: Endurance, thresholds: GateThresholds) -> list[GateCheck]:
    names: tuple[CheckName, CheckName] = (
        ("memory_growth_genai", "edge_input_genai")
        if endurance.runtime == "genai"
        else ("memory_growth_foundry", "edge_input_foundry")
    )
    checks = [no_fault(names[1], [edge_input.name for edge_input in endurance.edge_inputs if not edge_input.handled])]
    if endurance.memory is not None:
        limit = thresholds.max_memory_growth_bytes_per_request
        checks.append(beyond_noise(names[0], endurance.memory.bytes_per_request, limit))
    return checks


def _notes(evaluation: Evaluation, checks: Sequence[GateCheck]) -> Iterator[str]:
    if not evaluation.has_reference:
        yield "There is no source checkpoint to compare with: only checks of the variant alone were made."
    elif evaluation.quality_loss is None:
        yield "The evaluation rows have no expected answers: the task score was not judged."
    yield from evaluation.notes
    yield from notes_on_endless(evaluation)
    for check in checks:
        if not check.decided and check.detail:
            yield (
                f"{check.title} is not decided: {check.value:,.3g}, {check.detail}, where the threshold is "
                f"{check.threshold:,.3g}. The divergence decides."
            )
        elif not check.decided:
            yield (
                f"{check.title} is not decided: {check.value:,.5g}, between {check.low:,.5g} and "
                f"{check.high:,.5g}, where the threshold is {check.threshold:,.5g}. More rows or requests decide it."
            )
    mismatches = evaluation.template_mismatches.count
    if mismatches:
        share = f"{mismatches} of {len(evaluation.rows)} prompts"
        yield f"The runtime renders or tokenizes {share} differently from transformers."


def _on_what_decided(evaluation: Evaluation, thresholds: GateThresholds, *, by_score: bool) -> Iterator[str]:
    loss = evaluation.quality_loss
    if by_score:
        yield "There are enough rows for the task score to decide: the distributions would reject only a broken model."
        for check in _against_reference(evaluation, thresholds):
            if check.rejects and check.name in ("top1_agreement", "kl_divergence") and check.value is not None:
                asked = f"{check.bound} {check.threshold:g}"
                yield f"With fewer rows, {check.title} would have failed: {check.value:,.3g}, {asked} is required."
    elif loss is not None and beyond_noise("quality_loss", loss, thresholds.max_quality_loss).decided:
        yield "The source checkpoint has too few correct answers for the score to decide: the distributions decide."


def _warnings(evaluation: Evaluation, checks: Sequence[GateCheck], thresholds: GateThresholds) -> Iterator[str]:
    for check in checks:
        if check.allowed:
            found = "not finite" if check.value is None else f"{check.value:,.3g}"
            yield f"{check.title} failed and was allowed: {found}, {check.bound} {check.threshold:,.3g} is required."
    of_source, of_variant = ended_answers(evaluation)
    if of_source and not any((*of_source, *of_variant)):
        yield (
            f"None of {len(of_source)} answers ended within its limit of tokens, and neither did the source "
            "checkpoint's. If they should, its end tokens are wrong, or it never learned to end a turn."
        )
    formless = _formless_as_the_source(evaluation)
    if formless and thresholds.source_excuses_output:
        yield (
            f"{formless} of {len(evaluation.rows)} answers lack the output format, like the source checkpoint's "
            "answers to the same rows."
        )


class VariantVerdict(GateVerdict):
    """The verdict on a variant of a version, and the thresholds."""

    precision: str
    thresholds: GateThresholds


VERDICT = Kind("verdict", VariantVerdict)


@stage("judge variant", run_name="judge-{variant.precision}")
def judge_stored_variant(
    variant: Variant,
    evaluated: Evaluation,
    thresholds: GateThresholds,
    *,
    length_sweep: LengthSweep | None,
    parity: TemplateParity | None,
    text: TextComparison | None,
    endurance: Sequence[Endurance],
    allow: Collection[str],
) -> GateVerdict:
    """Judge a variant and append the verdict to the version's evidence."""
    verdict = judge(
        evaluated,
        thresholds,
        length_sweep=length_sweep,
        parity=parity,
        text=text,
        endurance=endurance,
        allow=allow,
    )
    record = VariantVerdict(precision=variant.precision, thresholds=thresholds, **dict(verdict))
    variant.version.record(VERDICT, record)
    get_run_logger().info("%s", verdict_line(variant.precision, verdict))
    return verdict


def verdict_line(precision: str, verdict: GateVerdict) -> str:
    """Return the run log's sentence on a verdict, with each failed check's value and threshold."""
    if verdict.passed:
        return f"{precision} passed the gate: {len(verdict.checks)} checks."
    told = ", ".join(
        f"{check.name} {'-' if check.value is None else format(check.value, '.4g')} (limit {check.threshold:.4g})"
        for check in verdict.failed_checks
    )
    return f"{precision} was rejected by the gate: {told}."
