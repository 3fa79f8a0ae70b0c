"""What to do about rejected variants, from what was tried and measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slmops.infra.storage.version import Version
from slmops.tasks.build.recipes import OLIVE_CONFIG, ladder_of
from slmops.tasks.checkpoint.inspection import EVALUATION_FILE
from slmops.tasks.questions.evaluation_set import BUILT_IN, EvaluationSet
from slmops.tasks.report.attempts import nearest_of
from slmops.tasks.report.blocks import Block, Heading, Listing, Paragraph, Strong, Text, bullets, joined, sentences
from slmops.tasks.report.records import DeployReport, VariantReport
from slmops.tasks.request.deploy_request import DEVICE_OF_PROVIDER
from slmops.tasks.verdict.advice import Advice, Rejection, Step, advice_on, first_step
from slmops.tasks.verdict.checks import GateCheck
from slmops.tasks.workshop import workshop


def with_advice(
    variants: Sequence[VariantReport], version: Version, evaluation: EvaluationSet
) -> tuple[VariantReport, ...]:
    """Return the variants, each rejected one with what to do about it."""
    return tuple(
        variant.model_copy(update=_help(variant, variants, version, evaluation))
        if variant.status == "rejected" and variant.gate
        else variant
        for variant in variants
    )


def _help(
    variant: VariantReport, variants: Sequence[VariantReport], version: Version, evaluation: EvaluationSet
) -> dict[str, object]:
    advice = advice_on(_rejection(variant, variants, version, evaluation))
    return {
        "advice": advice,
        "nearest": nearest_of(variant.attempts, _recipe_of(variant)),
        "what_to_do": first_step(advice),
    }


def _recipe_of(variant: VariantReport) -> str:
    """Return the name of a variant's recipe; the precision where it has none."""
    if variant.recipe == OLIVE_CONFIG:
        return OLIVE_CONFIG
    return (variant.recipe or "").partition("-")[2] or variant.precision


def _rejection(
    variant: VariantReport, variants: Sequence[VariantReport], version: Version, evaluation: EvaluationSet
) -> Rejection:
    provider = version.variant(variant.precision).execution_provider
    ladder = ladder_of(variant.precision, provider) if variant.recipe else ()
    lengths = variant.details.length_sweep.lengths if variant.details.length_sweep else ()
    return Rejection(
        reference=version.reference,
        checkpoint=version.manifest.source.origin,
        deploy=tuple(_deploy(version, provider, evaluation)),
        precision=variant.precision,
        precisions=tuple(other.precision for other in variants),
        ladder=tuple(recipe.name for recipe in ladder),
        tried=(*(attempt.recipe for attempt in variant.attempts), _recipe_of(variant)),
        calibrated=frozenset(recipe.name for recipe in ladder if recipe.is_calibrated),
        registered=tuple(other.precision for other in variants if other.status == "registered"),
        failed=_once_each(variant.gate.failed_checks) if variant.gate else (),
        evaluation=variant.details.evaluation,
        most_rows=workshop().settings.evaluation.max_rows,
        valid_lengths=tuple(length.prompt_tokens for length in lengths if length.valid),
        reliable=variant.reliable is not False,
    )


def _once_each(checks: Sequence[GateCheck]) -> tuple[GateCheck, ...]:
    """Return the first check of each name: of a mode with thoughts or without, the steps are the same."""
    return tuple({check.name: check for check in reversed(checks)}.values())[::-1]


def _deploy(version: Version, provider: str, evaluation: EvaluationSet) -> Iterator[str]:
    yield from ("slmops", "deploy", version.manifest.source.origin, "--name", version.name)
    if provider != "cpu":
        yield from ("--provider", provider, "--device", DEVICE_OF_PROVIDER[provider])
    if evaluation.origin not in (EVALUATION_FILE, BUILT_IN):
        yield from ("--eval", evaluation.origin)


@dataclass(frozen=True)
class SharedAdvice:
    """The same advice on one or more variants: what each failed check means, and the steps, each once."""

    precisions: tuple[str, ...]
    advice: tuple[Advice, ...]

    @property
    def who(self) -> str:
        """The variants, in words."""
        *others, last = self.precisions
        return f"{', '.join(others)} and {last}" if others else last

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of all checks, in order; the last of a check, which allows it, after all others."""
        helpful = [step for found in self.advice for step in found.steps[:-1]]
        return tuple(dict.fromkeys([*helpful, *(found.steps[-1] for found in self.advice if found.steps)]))


def shared_advice(report: DeployReport) -> list[SharedAdvice]:
    """Return the advice on a report's rejected variants; those with the same advice share it."""
    groups: dict[tuple[Advice, ...], list[str]] = {}
    for variant in report.variants:
        if variant.advice:
            groups.setdefault(variant.advice, []).append(variant.precision)
    return [SharedAdvice(tuple(precisions), advice) for advice, precisions in groups.items()]


def advice_lines(report: DeployReport) -> Iterator[str]:
    """Yield the advice for a terminal; a command has its own line, so that it can be copied."""
    for shared in shared_advice(report):
        yield f"What to do about {shared.who}:"
        for found in shared.advice:
            yield f"  {found.check.replace('_', ' ')}: {found.meaning}"
        for number, step in enumerate(shared.steps, 1):
            yield f"  {number}. {step.text}"
            if step.command:
                yield f"     {step.command}"


def advice_blocks(report: DeployReport) -> Iterator[Block]:
    """Yield the report's section on rejected variants."""
    for shared in shared_advice(report):
        yield Heading(f"What to do about {shared.who}")
        meanings: list[Text] = [
            joined([Strong(found.check.replace("_", " ")), sentences(found.meaning)], ": ") for found in shared.advice
        ]
        yield from bullets(meanings)
        for step in shared.steps:
            yield Paragraph(sentences(step.text))
            if step.command:
                yield Listing(step.command, "sh")
