"""The report's content in reading order: verdict, choice, how to call it, figures, checks, history, provenance."""

import json
from collections.abc import Iterator, Sequence
from typing import get_args

from slmops.tasks.exams.measurement import MetricName
from slmops.tasks.report.attempts import recipe_blocks, replacement_blocks
from slmops.tasks.report.blocks import (
    Block,
    Bullets,
    Code,
    Details,
    Figure,
    Heading,
    Listing,
    Paragraph,
    Strong,
    Text,
    bullets,
    joined,
    quoted,
    sentences,
    table,
    visible,
)
from slmops.tasks.report.per_variant import side_by_side
from slmops.tasks.report.quality import quality_blocks
from slmops.tasks.report.records import DeployReport, VariantReport
from slmops.tasks.report.rejections import advice_blocks
from slmops.tasks.report.wording import (
    INTERVALS,
    NOTHING,
    check_threshold,
    check_value,
    decimal,
    estimated,
    factor,
    in_spite_of,
    megabytes,
    percent,
    ratio,
    shown,
    signed_percent,
)
from slmops.tasks.verdict.history import Change

# Sizes in Microsoft's tutorial, as a share of the fp32 size.
PROMISED_SHARE_OF_FP32 = {"fp16": 0.5, "int8": 0.25, "int4": 0.125}

METRIC_TITLES = {
    "load_ms": "load, ms",
    "ttft_ms": "time to first token, ms",
    "prompt_processing_throughput_tps": "prompt, tok/s",
    "token_generation_throughput_tps": "new tokens, tok/s",
    "inter_token_latency_ms": "between tokens, ms",
    "e2e_latency_ms": "whole answer, ms",
    "peak_rss_bytes": "peak memory",
    "cpu_percent": "CPU, % of a core",
    "size_bytes": "size",
}


def document(report: DeployReport) -> list[Block]:
    """Return the whole report, without sections for what was not measured."""
    return [
        *_verdict(report),
        *_choice(report),
        *_others(report),
        *advice_blocks(report),
        *_attention(report),
        *_variants(report),
        *_speed(report),
        *quality_blocks(report),
        *recipe_blocks(report),
        *_history(report),
        *_remarks(report),
        *_statements(report),
        *_provenance(report),
    ]


def _verdict(report: DeployReport) -> Iterator[Block]:
    yield Heading(f"{report.reference}: {report.status}", level=1)
    yield Paragraph((Strong(_headline(report)), f" {sentences(report.reason)}" if report.reason else ""))
    for variant in report.variants:
        if variant.allowed:
            yield Paragraph(Strong(f"{variant.precision}: {in_spite_of(variant.gate)}"))
    yield from replacement_blocks(report)
    disturbed = [variant.precision for variant in report.variants if variant.reliable is False]
    if disturbed:
        of = " and ".join(disturbed)
        yield Paragraph(("The machine was busy: ", Strong(f"the figures of speed of {of} are not reliable.")))
    facts = [report.summary]
    if report.aliases:
        facts.append(f"This version is the {' and '.join(report.aliases)}.")
    parameters = f" ({report.parameters:,} parameters)" if report.parameters else ""
    yield Paragraph(
        (" ".join(facts), " Built from ", Code(report.checkpoint), f"{parameters}, judged on {report.evaluation}.")
    )
    if report.description:
        yield Paragraph(f"Purpose: {visible(report.description)}")
    if report.budget:
        yield Paragraph(("Budget: ", *joined([Code(limit) for limit in report.budget]), "."))


def _headline(report: DeployReport) -> str:
    if report.version is None:
        return "No variant could be built, so there is no version."
    if any(variant.status == "built" for variant in report.variants):
        return "Built and stored; not judged yet."
    if report.selected is None:
        passed = [variant.precision for variant in report.variants if variant.status == "registered"]
        return "No variant was chosen." if passed else "No variant may serve."
    served = f" and serves as {report.foundry_model_id}" if report.foundry_model_id else ""
    return f"{report.selected} is chosen{served}."


def chosen_variant(report: DeployReport) -> VariantReport | None:
    """Return the chosen variant, or None."""
    return next((variant for variant in report.variants if variant.precision == report.selected), None)


def _choice(report: DeployReport) -> Iterator[Block]:
    ids = [variant.foundry_model_id for variant in report.variants if variant.foundry_model_id]
    chosen = chosen_variant(report)
    if chosen is not None:
        yield Heading(f"The choice: {chosen.precision}")
        yield Bullets(list(_key_figures(report, chosen)))
    if not ids:
        return
    example = report.foundry_model_id or (chosen and chosen.foundry_model_id) or ids[-1]
    yield Heading("How to call it", level=3)
    yield Listing(f"slmops chat {report.reference}", "sh")
    yield Details("In Python", [Listing(sdk_example(example, report.foundry_dir), "python")])
    answered = (
        chosen if chosen and chosen.answer else next((variant for variant in report.variants if variant.answer), None)
    )
    if answered is not None and answered.answer:
        asked: Text = ("Asked ", quoted(report.question), ", ") if report.question else ""
        yield Paragraph(joined([asked, (f"{answered.precision} answered ", quoted(answered.answer), ".")], ""))
    yield Paragraph("Registered with Foundry Local:")
    yield Listing("\n".join(dict.fromkeys([*ids, example])))


def _key_figures(report: DeployReport, chosen: VariantReport) -> Iterator[Text]:
    """Yield the chosen variant's figures, one line each."""
    evaluated = chosen.details.evaluation
    if chosen.size_bytes is not None:
        share = size_share(chosen, report.parameters)
        yield (Strong(megabytes(chosen.size_bytes)), f" on disk{f', {share} of fp32' if share else ''}")
    if evaluated and evaluated.score:
        source_score = evaluated.reference_score
        yield (
            Strong(estimated(evaluated.score, percent)),
            " is the score",
            f"; the checkpoint's is {percent(source_score.value)}" if source_score else "",
        )
    elif "exact_match" in chosen.metrics:
        yield (Strong(percent(chosen.metrics["exact_match"])), " of the evaluation set answered exactly")
    if "top1_agreement" in chosen.metrics:
        yield (Strong(percent(chosen.metrics["top1_agreement"])), " of tokens are the checkpoint's own first choice")
    if "ttft_ms" in chosen.metrics:
        yield (Strong(f"{decimal(chosen.metrics['ttft_ms'])} ms"), f" to the first token{_prompt_length(chosen)}")
    if "token_generation_throughput_tps" in chosen.metrics:
        yield (Strong(f"{decimal(chosen.metrics['token_generation_throughput_tps'])} tokens/s"), " generated")
    if "peak_rss_bytes" in chosen.metrics:
        yield (Strong(megabytes(chosen.metrics["peak_rss_bytes"])), " of memory at the peak")


def _prompt_length(variant: VariantReport) -> str:
    measured = variant.details.measurement
    if measured is None:
        return ""
    first = measured.by_prompt_length[0]
    requests = first.statistics["ttft_ms"].count
    return f" of a prompt of {first.prompt_tokens:,} tokens (median of {requests:,} requests)"


def size_share(variant: VariantReport, parameters: int) -> str:
    """Return a variant's size as a share of its parameters in fp32; empty if that is unknown."""
    if variant.size_bytes is None or not parameters:
        return ""
    return f"{variant.size_bytes / (4 * parameters):.3f}"


def sdk_example(model_id: str, foundry_dir: str) -> str:
    """Return a Python program that calls a registered model through Foundry Local's SDK."""
    return (
        "from foundry_local_sdk import CatalogType, ChatSession, Configuration, FoundryLocalManager\n"
        "from foundry_local_sdk import MessageItem, Request, RequestOptions, SearchOptions\n\n"
        "FoundryLocalManager.initialize(\n"
        f'    Configuration(app_name="app", model_cache_dir={json.dumps(foundry_dir)})\n'
        ")\n"
        "catalog = FoundryLocalManager.instance.get_catalog(CatalogType.LOCAL)\n"
        f'model = catalog.get_model_variant("{model_id}")\n'
        "model.load()\n"
        "with ChatSession(model) as session:\n"
        # By default Foundry reserves 2,048 tokens, and refuses if the context is smaller.
        "    session.set_options(RequestOptions(search=SearchOptions(max_output_tokens=256)))\n"
        '    request = Request().add_item(MessageItem.user("Hello"))\n'
        "    with session.process_request(request) as response:\n"
        '        print("".join(part.text for item in response for part in item.parts))'
    )


def _others(report: DeployReport) -> Iterator[Block]:
    others = [variant for variant in report.variants if variant.precision != report.selected]
    told_why = [((Strong(variant.precision), f" ({variant.status}): "), why_not(variant)) for variant in others]
    items = [joined([name, why], "") for name, why in told_why if why]
    if items:
        yield Heading("Why not the others" if report.selected else "Why none was chosen")
        yield from bullets(items)


def why_not(variant: VariantReport) -> Text:
    """Return why a variant was not chosen: its failure, the gate's finding, or the choice's reason."""
    if variant.error:
        return quoted(variant.error)
    failed = variant.gate.failed_checks if variant.gate else ()
    if failed:
        return "; ".join(
            f"{check.title} {check_value(check)}, {check_threshold(check)} is required" for check in failed
        )
    return sentences(variant.reason)


def _variants(report: DeployReport) -> Iterator[Block]:
    yield Heading("Size and quality")
    yield Figure("quality", "Quality against size: up and left is better. A ring marks the chosen variant.")
    rows: list[Sequence[Text]] = []
    for variant in report.variants:
        promised = PROMISED_SHARE_OF_FP32.get(variant.precision)
        share = size_share(variant, report.parameters)
        size = NOTHING if variant.size_bytes is None else megabytes(variant.size_bytes)
        of_fp32 = f"{share} ({promised})" if share and promised else share or NOTHING
        rows.append((Strong(variant.precision), variant.status, size, of_fp32))
    yield from table(("variant", "verdict", "size", "of fp32"), rows)
    if any(size_share(variant, report.parameters) for variant in report.variants):
        yield Paragraph(
            "Of fp32: size as a share of the parameters in fp32; in brackets the share in Microsoft's tutorial."
        )


def _speed(report: DeployReport) -> Iterator[Block]:
    measured = [
        variant for variant in report.variants if "ttft_ms" in variant.metrics or "peak_rss_bytes" in variant.metrics
    ]
    if not measured:
        return
    yield Heading("Speed and memory")
    yield Figure("throughput", "Medians; whiskers: from the slowest to the fastest request.")
    columns = {
        "TTFT, ms": "ttft_ms",
        "prompt tok/s": "prompt_processing_throughput_tps",
        "new tok/s": "token_generation_throughput_tps",
        "peak MB": "peak_rss_bytes",
    }
    rows: list[Sequence[Text]] = [
        (Strong(variant.precision), *(_metric(variant, name) for name in columns.values())) for variant in measured
    ]
    yield from table(("variant", *columns), rows)
    if statistics := list(_statistics(measured)):
        yield Details("All figures of speed", statistics)
    yield Figure("latency", "Time to the first token over the length of the prompt; dashed: proportional growth.")
    yield Figure("memory", "Growth of the resident memory since the first request.")


def _metric(variant: VariantReport, name: str) -> str:
    value = variant.metrics.get(name)
    if value is None:
        return NOTHING
    return f"{value / 1e6:,.0f}" if name.endswith("_bytes") else decimal(value)


def _statistics(variants: Sequence[VariantReport]) -> Iterator[Block]:
    measured = {variant.precision: variant.details.measurement for variant in variants if variant.details.measurement}
    lengths: dict[str, dict[str, dict[Text, Text]]] = {}
    for precision, measurement in measured.items():
        for length in measurement.by_prompt_length:
            tokens = f"{length.prompt_tokens:,} prompt and {length.new_tokens:,} new tokens"
            lengths.setdefault(tokens, {})[precision] = {
                METRIC_TITLES[name]: f"{decimal(found.p50)} ({decimal(found.p95)}, {shown(found.stdev, decimal)})"
                for name, found in length.statistics.items()
            }
    for tokens, figures in lengths.items():
        yield Paragraph(f"{tokens}: the median; in brackets what 95 % are below, and the deviation.")
        yield from side_by_side("figure", figures)
    for precision, measurement in measured.items():
        process = [
            f"{METRIC_TITLES[name]}: {megabytes(value) if name.endswith('_bytes') else decimal(value)}"
            for name, value in measurement.metrics.items()
            if name in ("load_ms", "peak_rss_bytes", "cpu_percent")
        ]
        whole = f", the whole process: {'; '.join(process)}; {measurement.threads} threads."
        yield Paragraph((Strong(precision), whole))
        yield from bullets([sentences(note) for note in measurement.notes])


def _history(report: DeployReport) -> Iterator[Block]:
    history = report.history
    if history is None:
        return
    yield Heading(f"Since {history.previous}")
    beyond = [change for change in history.changes if change.trend != "same"]
    if beyond:
        counts = [f"{sum(change.trend == trend for change in beyond)} {trend}" for trend in ("better", "worse")]
        yield Paragraph(f"{' and '.join(counts)} beyond noise, of {len(history.changes)} figures. {INTERVALS}")
        yield from table(("figure", "before", "after", "change"), [_change(change) for change in beyond])
    elif history.changes:
        yield Paragraph(f"Nothing changed beyond noise in {len(history.changes)} figures.")
    alike = [_change(change) for change in history.changes if change.trend == "same"]
    if alike:
        columns = ("figure", "before", "after", "change")
        yield Details(f"{len(alike)} figures within noise", list(table(columns, alike)))
    yield from bullets([sentences(note) for note in history.notes])


def _change(change: Change) -> Sequence[Text]:
    # Changes of speed, memory and size are factors; those of a task score and a divergence are differences.
    is_ratio = change.metric in get_args(MetricName)
    in_bytes = change.metric.endswith("_bytes")
    wording = megabytes if in_bytes else decimal if is_ratio else ratio
    difference = signed_percent if change.metric == "score" else ratio
    changed = estimated(change.change, factor if is_ratio else difference)
    verdict: Text = change.trend if change.trend == "same" else Strong(change.trend)
    title = METRIC_TITLES.get(change.metric, change.metric.replace("_", " "))
    return (
        f"{change.precision}: {title}",
        wording(change.before),
        wording(change.after),
        joined([verdict, changed], " "),
    )


def _attention(report: DeployReport) -> Iterator[Block]:
    """Yield what a reader should know before the figures."""
    failures = [
        joined([Strong(variant.precision), quoted(variant.error, 2000)], ": ")
        for variant in report.variants
        if variant.error
    ]
    warnings = [sentences(text) for text in report.all_warnings]
    for title, items in (("Failures", failures), ("Warnings", warnings)):
        if items:
            yield Heading(title)
            yield from bullets(items)


def _remarks(report: DeployReport) -> Iterator[Block]:
    notes = [sentences(text) for text in report.all_notes]
    if notes:
        yield Heading("Notes")
        yield from bullets(notes)


def _statements(report: DeployReport) -> Iterator[Block]:
    if report.statements:
        yield Heading("Facts from the checkpoint's files")
        rows = [(said.name, visible(said.value), said.read_from, visible(said.used)) for said in report.statements]
        yield from table(("what", "value", "read from", "used"), rows)


def _provenance(report: DeployReport) -> Iterator[Block]:
    origin = report.provenance
    measured = next((variant.details.measurement for variant in report.variants if variant.details.measurement), None)
    if origin is None and measured is None and not any(variant.digest for variant in report.variants):
        return
    yield Heading("Provenance")
    facts: list[Text] = []
    if origin is not None:
        facts.append(f"Made {origin.created_at} from a {origin.architecture}.")
    if measured is not None:
        machine = measured.hardware
        cores = f"{machine.physical_cores or machine.logical_cores or 'unknown'} cores"
        memory = f"{machine.ram_bytes / 1e9:,.1f} GB of memory"
        facts.append(f"Measured on {machine.cpu}, {cores}, {memory}, {machine.os} ({machine.machine}).")
    recipes = [
        (f"{variant.precision} by the recipe ", Code(variant.recipe)) for variant in report.variants if variant.recipe
    ]
    if recipes:
        facts.append(("Built: ", *joined(recipes), "."))
    yield from bullets(facts)
    digests = {"source": origin.source_digest, "manifest": origin.manifest_digest} if origin else {}
    digests |= {variant.precision: variant.digest for variant in report.variants if variant.digest}
    if digests:
        width = max(map(len, digests))
        yield Listing("\n".join(f"{name.ljust(width)}  sha256:{digest}" for name, digest in digests.items()), "text")
    versions = {**(measured.versions if measured else {}), **(origin.builder if origin else {})}
    if versions:
        rows = [(name, version) for name, version in sorted(versions.items())]
        yield Details("Versions of the builders and runtimes", list(table(("package", "version"), rows)))
