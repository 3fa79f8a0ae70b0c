"""The recipes that were tried."""

from collections.abc import Iterator, Sequence

from slmops.tasks.build.climbing import Attempt
from slmops.tasks.build.search import Trial
from slmops.tasks.report.blocks import (
    Block,
    Code,
    Details,
    Heading,
    Paragraph,
    Strong,
    Text,
    bullets,
    joined,
    quoted,
    table,
)
from slmops.tasks.report.records import DeployReport
from slmops.tasks.report.wording import decimal, megabytes, percent, ratio, shown


def nearest_of(attempts: Sequence[Attempt], recipe: str) -> str:
    """Return the name of the attempted recipe that is closest to the checkpoint; `recipe` if none was compared."""
    compared = [attempt for attempt in attempts if "kl_divergence" in attempt.metrics]
    return min(compared, key=lambda attempt: attempt.metrics["kl_divergence"]).recipe if compared else recipe


def attempts_text(attempts: Sequence[Attempt]) -> str:
    """Return attempts in one line, such as `int4 rejected (KL divergence 0.131), int4-mixed passed (...)`."""
    return ", ".join(f"{attempt.recipe} {attempt.status}{_in_brackets(attempt)}" for attempt in attempts)


def _in_brackets(attempt: Attempt) -> str:
    divergence = attempt.metrics.get("kl_divergence")
    return f" (KL divergence {ratio(divergence)})" if divergence is not None else ""


def replacement_blocks(report: DeployReport) -> Iterator[Block]:
    """Yield a sentence for each variant that has another recipe than the first one tried, and why."""
    for variant in report.variants:
        kept = (variant.recipe or "").partition("-")[2]
        first = variant.attempts[0] if variant.attempts else None
        if first is None or kept in ("", first.recipe):
            continue
        missed = ", ".join(name.replace("_", " ") for name in first.failed_checks)
        why = f" missed {missed}." if missed else " could not be built."
        yield Paragraph((Strong(variant.precision), " has the recipe ", Code(kept), ": ", Code(first.recipe), why))


def recipe_blocks(report: DeployReport) -> Iterator[Block]:
    """Yield the tables of a search's trials, and of the attempts if more than one recipe was tried for a variant."""
    yield from _search(report)
    yield from _attempts(report)


def _attempts(report: DeployReport) -> Iterator[Block]:
    tried = [variant for variant in report.variants if len(variant.attempts) > 1]
    if not tried:
        return
    yield Heading("Recipes tried for the gate")
    columns = ("recipe", "verdict", "size", "score", "top-1 agreement", "KL divergence", "missed")
    yield from table(columns, [_row(attempt) for variant in tried for attempt in variant.attempts])


def _row(attempt: Attempt) -> Sequence[Text]:
    figures = attempt.metrics
    return (
        quoted(attempt.recipe),
        attempt.status,
        shown(figures.get("size_bytes"), megabytes),
        shown(figures.get("score"), percent),
        shown(figures.get("top1_agreement"), percent),
        shown(figures.get("kl_divergence"), ratio),
        attempt.error or ", ".join(name.replace("_", " ") for name in attempt.failed_checks) or "-",
    )


def _search(report: DeployReport) -> Iterator[Block]:
    if report.search is None:
        return
    trials = report.search.trials
    chosen = [trial for trial in trials if trial.chosen]
    yield Heading("Recipes that were tried")
    yield from bullets([joined((quoted(trial.recipe), f": {trial.reason}"), "") for trial in chosen])
    columns = ("recipe", "size", "new tok/s", "score", "KL divergence")
    yield from table(columns, [_trial(trial) for trial in trials if trial.candidate])
    others = [
        joined((quoted(trial.recipe), f": {trial.error or trial.reason}"), "") for trial in trials if not trial.chosen
    ]
    yield Details(f"Why not the other {len(others)}", list(bullets(others)))


def _trial(trial: Trial) -> Sequence[Text]:
    figures = trial.candidate
    assert figures is not None
    return (
        quoted(trial.recipe),
        megabytes(figures.size_bytes),
        decimal(figures.token_generation_throughput_tps),
        shown(trial.score, percent),
        shown(figures.kl_divergence, ratio),
    )
