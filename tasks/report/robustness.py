"""The report's parts on robustness: memory in long use, speed over prompt lengths, and edge inputs."""

from collections.abc import Callable, Iterator, Sequence

from slmops.tasks.exams.endurance import EdgeInputOutcome, Endurance
from slmops.tasks.exams.length_sweep import LengthFigures, LengthSweep
from slmops.tasks.report.blocks import Block, Details, Paragraph, Strong, Text, bullets, joined, quoted, table
from slmops.tasks.report.per_variant import RUNTIMES, Variants, notes_of, side_by_side, threshold_of
from slmops.tasks.report.records import VariantReport
from slmops.tasks.report.wording import INTERVALS, NOTHING, bytes_per_request, decimal, estimated, factor, shown


def _in_each_runtime(variants: Variants) -> list[tuple[VariantReport, Endurance]]:
    return [(variant, endurance) for variant in variants for endurance in variant.details.endurance]


def memory(variants: Variants) -> Iterator[Block]:
    """Yield the growth of memory in long use."""
    rows: list[Sequence[Text]] = []
    for variant, endurance in _in_each_runtime(variants):
        grown = endurance.memory
        found = "did not end" if grown is None else estimated(grown.bytes_per_request, bytes_per_request)
        requests = NOTHING if grown is None else f"{len(grown.rss_bytes):,}"
        name = f"{variant.precision}, {RUNTIMES[endurance.runtime]}"
        rows.append((name, requests, found, threshold_of(variant, f"memory_growth_{endurance.runtime}")))
    if rows:
        yield Paragraph(f"Growth of the resident memory per request, after the warm-up. {INTERVALS}")
    yield from table(("variant, runtime", "requests", "growth", "asked"), rows)


def length_sweep(variants: Variants) -> Iterator[Block]:
    """Yield the change of speed with the prompt's length."""
    swept = [
        (variant, variant.details.length_sweep)
        for variant in variants
        if variant.details.length_sweep and variant.details.length_sweep.lengths
    ]
    rows: list[Sequence[Text]] = []
    for variant, sweep in swept:
        cliff = shown(sweep.worst_cliff_ratio, factor)
        if sweep.worst_cliff_prompt_tokens is not None:
            cliff += f" at {sweep.worst_cliff_prompt_tokens:,}"
        valid = f"{sum(length.valid for length in sweep.lengths)} of {len(sweep.lengths)}"
        exponent = estimated(sweep.ttft_scaling_exponent, lambda value: f"{value:.2f}")
        rows.append((Strong(variant.precision), exponent, cliff, valid))
    if rows:
        limits = {threshold_of(variant, "steadiness") for variant, _ in swept} - {NOTHING}
        asked = f" ({', '.join(sorted(limits))} is required)" if limits else ""
        yield Paragraph(
            "Exponent: time to the first token grows as the prompt's length to this power. Drop: the largest loss of "
            f"throughput from one length to the next, and the prompt tokens where it is{asked}."
        )
    yield from table(("variant", "exponent", "drop", "valid"), rows)
    folded = [
        *side_by_side("TTFT, ms, at tokens", _at_lengths(swept, lambda length: length.ttft_ms)),
        *side_by_side(
            "new tok/s, at tokens", _at_lengths(swept, lambda length: length.token_generation_throughput_tps)
        ),
    ]
    if folded:
        yield Details("Every prompt length", folded)
    yield from notes_of([(variant.precision, note) for variant, sweep in swept for note in sweep.notes])


def _at_lengths(
    swept: Sequence[tuple[VariantReport, LengthSweep]], figure: Callable[[LengthFigures], float]
) -> dict[str, dict[Text, Text]]:
    """Return a figure by variant and prompt length; at a length without a valid answer it says so."""
    return {
        variant.precision: {
            f"{length.prompt_tokens:,}": decimal(figure(length))
            if length.valid
            else Strong(f"{decimal(figure(length))}, not valid")
            for length in sweep.lengths
        }
        for variant, sweep in swept
    }


def edge_input(variants: Variants, selected: str | None) -> Iterator[Block]:
    """Yield the outcomes of edge inputs: all of the selected variant, and of each variant with a bad one."""
    rows: list[Sequence[Text]] = []
    faults: list[Text] = []
    reaching: dict[str, list[str]] = {}
    short: list[str] = []
    folded: list[Block] = []
    for variant, endurance in _in_each_runtime(variants):
        name = f"{variant.precision}, {RUNTIMES[endurance.runtime]}"
        outcomes = endurance.edge_inputs
        if not outcomes:
            continue
        counts = [str(sum(request.outcome == outcome for request in outcomes)) for outcome in ("answered", "refused")]
        short += [name] if endurance.extent == "short" else []
        bad = [outcome for outcome in outcomes if not outcome.handled]
        rows.append((name, *counts, Strong(str(len(bad))) if bad else "0"))
        faults += [joined([f"{name}: ", _outcome(outcome)], "") for outcome in bad]
        if any(outcome.control_tokens for outcome in outcomes):
            reaching.setdefault(RUNTIMES[endurance.runtime], []).append(variant.precision)
        # The variants usually have the same outcomes, so one of them is shown.
        if bad or variant.precision == selected or selected is None:
            folded.append(Paragraph((Strong(name), ":")))
            folded += bullets([_outcome(outcome) for outcome in outcomes])
    if rows:
        yield Paragraph("Each difficult input must end in an answer or a clean error, and leave the runtime working.")
    yield from table(("variant, runtime", "answered", "refused", "bad"), rows)
    if short:
        yield Paragraph(
            "A variant of the version with the same tokenizer, chat template and settings handled all inputs, so only "
            f"those whose outcome depends on the weights were tried here: {'; '.join(short)}."
        )
    yield from bullets(faults)
    for runtime, precisions in reaching.items():
        yield Paragraph(
            f"Control tokens typed by a user reach the model as control tokens in {runtime} ({', '.join(precisions)})."
        )
    yield from notes_of(
        [
            (f"{variant.precision} in {RUNTIMES[endurance.runtime]}", note)
            for variant, endurance in _in_each_runtime(variants)
            for note in endurance.notes
        ]
    )
    if folded:
        yield Details("The outcome of each input", folded)


def _outcome(outcome: EdgeInputOutcome) -> Text:
    ended = outcome.outcome if outcome.alive else f"{outcome.outcome}, and the runtime did not work afterwards"
    shown: Text = (": ", quoted(outcome.detail, 80)) if outcome.detail else ""
    return joined([(quoted(outcome.name, 60), f" {ended}"), shown], "")
