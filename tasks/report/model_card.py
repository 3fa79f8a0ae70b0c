"""The Hugging Face model card of one variant: description, how to call it, figures, provenance, limits."""

import re
from collections.abc import Iterator
from typing import Any

from slmops.infra.checkpoints.source import SourceKind, parse_checkpoint
from slmops.infra.errors import BadInput
from slmops.infra.storage.manifest import Manifest
from slmops.tasks.report.attempts import attempts_text
from slmops.tasks.report.blocks import (
    Block,
    Code,
    Details,
    Heading,
    Listing,
    Paragraph,
    Strong,
    Text,
    bullets,
    table,
    visible,
)
from slmops.tasks.report.document import METRIC_TITLES, sdk_example
from slmops.tasks.report.markdown import blocks_to_markdown
from slmops.tasks.report.records import VariantReport
from slmops.tasks.report.wording import (
    INTERVALS,
    check_threshold,
    check_value,
    check_verdict,
    decimal,
    estimated,
    in_spite_of,
    megabytes,
    percent,
    ratio,
)

TAGS = ("onnx", "onnxruntime", "onnxruntime-genai", "foundry-local", "chat", "slmops")
# The metrics in a card's model-index. The Hub knows the first two; the others have names of their own.
INDEXED = {
    "exact_match": "Exact match",
    "perplexity": "Perplexity",
    "score": "Mean score",
    "top1_agreement": "Top-1 agreement with the source checkpoint",
    "kl_divergence": "Mean KL divergence from the source checkpoint, nats per token",
}


def base_model_of(origin: str) -> str | None:
    """Return the Hub id that a checkpoint came from, None for a folder or an S3 address.

    It checks the file system: a text that names an existing folder is that folder.
    """
    try:
        source = parse_checkpoint(origin)
    except BadInput:  # a folder that no longer exists
        return None
    return source.location if source.kind is SourceKind.HUB else None


def model_card(
    manifest: Manifest,
    variant: VariantReport,
    *,
    evaluation: str,
    description: str = "",
    base_model: str | None = None,
    license_name: str | None = None,
) -> str:
    """Return the README.md of a variant's folder: YAML metadata, then text.

    `license_name` is that of the source. `evaluation` is `EvaluationSet.summary`. `base_model` is the Hub id of the
    source (`base_model_of`) where it has one. Local paths are left out: a card may be published. The figures are
    those of `variant.metrics`, with the intervals of its `details`.
    """
    from huggingface_hub import ModelCardData

    dataset = _dataset(evaluation)
    data = ModelCardData(
        base_model=base_model,
        license=license_name,
        library_name="onnxruntime-genai",
        pipeline_tag="text-generation",
        tags=[*TAGS, variant.precision],
        model_name=f"{manifest.name}-{variant.precision}",
        eval_results=list(_eval_results(variant, dataset)) or None,
        # The Hub shows a quantized model under its base.
        **({"base_model_relation": "quantized"} if base_model else {}),
    )
    body = blocks_to_markdown(list(_blocks(manifest, variant, dataset, description, base_model)))
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _dataset(evaluation: str) -> str:
    count, rows_of, origin = evaluation.partition(" rows of ")
    return f"{count}{rows_of}{_last_part(origin)}" if rows_of else _last_part(evaluation)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _eval_results(variant: VariantReport, dataset: str) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for metric, title in INDEXED.items():
        if metric in variant.metrics:
            yield EvalResult(
                task_type="text-generation",
                dataset_type="jsonl",
                dataset_name=dataset,
                metric_type=metric,
                metric_name=title,
                metric_value=variant.metrics[metric],
            )


def _blocks(
    manifest: Manifest, variant: VariantReport, dataset: str, description: str, base_model: str | None
) -> Iterator[Block]:
    yield Heading(f"{manifest.name} {variant.precision}", level=1)
    if description:
        yield Paragraph(visible(description, 2000))
    source = manifest.source
    origin = Code(base_model or (source.origin if "://" in source.origin else _last_part(source.origin)))
    parameters = f" with {source.parameters:,} parameters" if source.parameters else ""
    yield Paragraph(
        (
            f"The {variant.precision} ONNX variant of ",
            Code(manifest.reference),
            f", a {source.architecture}{parameters} made of ",
            origin,
            " for onnxruntime-genai and Foundry Local by slmops.",
        )
    )
    if variant.allowed:
        yield Paragraph(Strong(in_spite_of(variant.gate)))
    yield Heading("How to call it")
    if variant.foundry_model_id:
        yield Paragraph(("Foundry Local knows it as ", Code(variant.foundry_model_id), " where slmops registered it:"))
        yield Listing(f"slmops chat {manifest.reference}", "sh")
        yield Paragraph(("Or in Python, with the folder that ", Code("slmops foundry-dir"), " prints:"))
        yield Listing(sdk_example(variant.foundry_model_id, "FOLDER"), "python")
    yield Paragraph("From this folder, without Foundry Local:")
    yield Listing(GENAI_EXAMPLE, "python")
    yield from _figures(variant, dataset)
    yield from _provenance(manifest, variant)
    yield Heading("Limits")
    yield from bullets(list(_limits(variant, dataset)))


GENAI_EXAMPLE = """\
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
messages = '[{"role": "user", "content": "Hello"}]'
prompt = tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=512)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode(prompt))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)"""


def _figures(variant: VariantReport, dataset: str) -> Iterator[Block]:
    evaluated, measured = variant.details.evaluation, variant.details.measurement
    rows: list[tuple[Text, Text]] = []
    if evaluated and evaluated.score:
        rows.append(("Score", estimated(evaluated.score, percent)))
        if evaluated.reference_score:
            rows.append(("Score of the checkpoint", estimated(evaluated.reference_score, percent)))
    elif "exact_match" in variant.metrics:
        rows.append(("Exact answers", percent(variant.metrics["exact_match"])))
    for metric, title, interval, wording in (
        ("top1_agreement", "Top-1 agreement", evaluated and evaluated.top1_agreement_interval, percent),
        ("kl_divergence", "Mean KL divergence, nats", evaluated and evaluated.kl_divergence_interval, ratio),
    ):
        if metric in variant.metrics:
            shown = estimated(interval, wording) if interval else wording(variant.metrics[metric])
            rows.append((title, shown))
    for metric in ("ttft_ms", "prompt_processing_throughput_tps", "token_generation_throughput_tps", "peak_rss_bytes"):
        if metric in variant.metrics:
            value = variant.metrics[metric]
            rows.append((METRIC_TITLES[metric], megabytes(value) if metric.endswith("_bytes") else decimal(value)))
    if variant.size_bytes is not None:
        rows.append(("size", megabytes(variant.size_bytes)))
    if not rows:
        return
    yield Heading("Figures")
    yield Paragraph(f"Quality on {dataset}. {INTERVALS}")
    yield from table(("figure", "value"), rows)
    if measured:
        machine, length = measured.hardware, measured.by_prompt_length[0]
        yield Paragraph(
            f"Speed: medians of {length.statistics['ttft_ms'].count:,} requests of {length.prompt_tokens:,} prompt and "
            f"{length.new_tokens:,} new tokens, {measured.threads} threads, {machine.cpu}, {machine.os}."
        )
    if variant.gate:
        checks = [
            (
                check.title,
                check_value(check),
                check_threshold(check),
                check_verdict(check) if check.passed else Strong(check_verdict(check)),
            )
            for check in variant.gate.checks
        ]
        yield Details("Checks", list(table(("check", "found", "asked", "verdict"), checks)))


def _provenance(manifest: Manifest, variant: VariantReport) -> Iterator[Block]:
    yield Heading("Provenance")
    facts: list[Text] = [
        ("Source: ", Code(f"sha256:{manifest.source.digest}")),
        ("Manifest of ", Code(manifest.reference), ": ", Code(f"sha256:{manifest.digest}"), f", {manifest.created_at}"),
    ]
    if variant.digest:
        facts.append(("This variant: ", Code(f"sha256:{variant.digest}")))
    if variant.recipe:
        facts.append(("Recipe: ", Code(variant.recipe)))
    if len(variant.attempts) > 1:
        facts.append(f"Recipes that were tried: {attempts_text(variant.attempts)}")
    facts.append("Built with " + ", ".join(f"{name} {version}" for name, version in sorted(manifest.builder.items())))
    yield from bullets(facts)


def _limits(variant: VariantReport, dataset: str) -> Iterator[Text]:
    yield f"Its quality was measured on {dataset} and says little about other questions."
    yield "Its weights are rounded, so its answers may differ from the checkpoint's, as the figures above show."
    yield "Speed and memory were measured on one machine."
    yield from (variant.gate.notes if variant.gate else ())
    yield from variant.warnings
    if variant.details.parity:
        yield from variant.details.parity.notes
