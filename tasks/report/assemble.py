"""The record of a deploy, assembled from the stages' results."""

from collections.abc import Mapping, Sequence
from typing import Any

from slmops.infra.storage.evidence import Selection
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.version import Version
from slmops.tasks.build.search import last_search
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.estimates import Estimate
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.statements import Statement
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.report.records import DeployReport, DeployStatus, Provenance, VariantDetails, VariantReport
from slmops.tasks.report.rejections import with_advice
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.stage import stage
from slmops.tasks.verdict.choice import Judged
from slmops.tasks.verdict.endless_check import thought_figures
from slmops.tasks.verdict.history import history_of
from slmops.tasks.verdict.pareto import Candidate
from slmops.tasks.verdict.tool_check import right_arguments, right_functions, right_silence
from slmops.tasks.workshop import workshop


def variant_metrics(details: VariantDetails) -> dict[str, float]:
    """Return a variant's figures as one flat record, without comparisons that were not made."""
    figures: dict[str, float | None] = {name: interval.value for name, interval in variant_intervals(details).items()}
    if details.evaluation:
        for name in ("top1_agreement", "kl_divergence", "kl_divergence_p99", "perplexity", "exact_match"):
            figures[name] = getattr(details.evaluation, name)
        if details.evaluation.perplexity and details.evaluation.reference_perplexity:
            figures["perplexity_ratio"] = details.evaluation.perplexity / details.evaluation.reference_perplexity
        if thoughts := thought_figures(details.evaluation, of_source=False):
            figures["thought_tokens"] = thoughts.tokens
    if details.measurement:
        figures.update({str(name): value for name, value in details.measurement.metrics.items()})
    if details.constraint:
        figures["constrained_throughput_tps"] = details.constraint.bound.tokens_per_s
        figures["unconstrained_throughput_tps"] = details.constraint.free.tokens_per_s
        figures["constraint_start_ms"] = details.constraint.bound.start_ms
    if details.text:
        figures["text_perplexity"] = details.text.perplexity
    return {name: value for name, value in figures.items() if value is not None}


def variant_intervals(details: VariantDetails) -> dict[str, Estimate]:
    """Return the intervals of a variant's figures by the figures' names."""
    estimates: dict[str, Estimate | None] = {}
    if details.evaluation:
        estimates |= {
            "top1_agreement": details.evaluation.top1_agreement_interval,
            "kl_divergence": details.evaluation.kl_divergence_interval,
            "score": details.evaluation.score,
            "quality_loss": details.evaluation.quality_loss,
            "output_conformity": details.evaluation.output_conformity,
            **_tool_estimates(details.evaluation),
        }
        if thoughts := thought_figures(details.evaluation, of_source=False):
            estimates |= {"thinking": thoughts.thinking, "ended_thoughts": thoughts.ended}
        for thinks, found in details.evaluation.modes.items():
            mode = "with_thoughts" if thinks else "without_thoughts"
            estimates |= {f"score_{mode}": found.score, f"quality_loss_{mode}": found.quality_loss}
    if details.constraint:
        for name, figures in (("constrained", details.constraint.bound), ("unconstrained", details.constraint.free)):
            estimates |= {
                f"{name}_conformity": figures.conformity,
                f"{name}_score": figures.score,
                f"{name}_well_formed_but_wrong": figures.well_formed_but_wrong,
            }
    if details.length_sweep:
        estimates["ttft_scaling_exponent"] = details.length_sweep.ttft_scaling_exponent
    if details.text:
        estimates["text_perplexity_ratio"] = details.text.perplexity_ratio
    for endurance in details.endurance:
        if endurance.memory:
            estimates[f"memory_growth_{endurance.runtime}_bytes_per_request"] = endurance.memory.bytes_per_request
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _tool_estimates(evaluation: Evaluation) -> dict[str, Estimate | None]:
    made = [row.calls for row in evaluation.rows if row.calls]
    return {
        "right_functions": right_functions(made),
        "right_arguments": right_arguments(made),
        "right_silence": right_silence(made),
    }


def judged(variant: VariantReport) -> Judged:
    """Return the choice's input for a measured variant."""
    evaluation = variant.details.evaluation
    scores = [row.score for row in evaluation.rows] if evaluation else []
    metrics = variant.metrics
    return Judged(
        candidate=Candidate(
            name=variant.precision,
            size_bytes=int(metrics["size_bytes"]),
            peak_rss_bytes=int(metrics["peak_rss_bytes"]),
            ttft_ms=metrics["ttft_ms"],
            token_generation_throughput_tps=metrics["token_generation_throughput_tps"],
            quality_loss=metrics.get("quality_loss"),
            kl_divergence=metrics.get("kl_divergence"),
            reliable=variant.reliable is not False,
        ),
        scores=tuple(score for score in scores if score is not None) if None not in scores and scores else None,
        allowed=variant.allowed,
    )


def in_order_of_size(variants: Sequence[VariantReport]) -> list[VariantReport]:
    """Return variants from the largest precision to the smallest."""
    return sorted(variants, key=lambda variant: ("fp32", "fp16", "int8", "int4").index(variant.precision))


def with_reasons(variants: Sequence[VariantReport], choice: Selection) -> tuple[VariantReport, ...]:
    """Return the variants, each with the reason why it was chosen or not."""
    return tuple(variant.model_copy(update={"reason": _reason(variant, choice)}) for variant in variants)


def _reason(variant: VariantReport, choice: Selection) -> str:
    if variant.status == "failed":
        return "failed"
    if variant.status == "rejected":
        names = [check.title for check in variant.gate.failed_checks] if variant.gate else []
        return f"rejected by the gate: {', '.join(names)}"
    return choice.reason if variant.precision == choice.selected else choice.reasons.get(variant.precision, "")


def overall_status(variants: Sequence[VariantReport], choice: Selection, *, unchanged: bool) -> DeployStatus:
    """Return a deploy's status from those of its variants: a failure has priority, then whether one was chosen.

    A deploy without a variant within the budget is rejected, even if variants are registered.
    """
    if any(variant.status == "failed" for variant in variants):
        return "failed"
    if choice.selected is None:
        return "rejected"
    return "unchanged" if unchanged else "registered"


def reference_scores(variants: Sequence[VariantReport]) -> dict[str, Any]:
    """Return the source checkpoint's scores, which every evaluation repeats."""
    evaluation = next((variant.details.evaluation for variant in variants if variant.details.evaluation), None)
    if evaluation is None:
        return {}
    return {"reference_exact_match": evaluation.reference_exact_match, "reference_score": evaluation.reference_score}


def provenance_of(manifest: Manifest) -> Provenance:
    """Return the provenance of a version."""
    return Provenance(
        source_digest=manifest.source.digest,
        manifest_digest=manifest.digest,
        architecture=manifest.source.architecture,
        builder=manifest.builder,
        created_at=manifest.created_at,
    )


def failures_of(errors: Mapping[str, str]) -> list[VariantReport]:
    """Return the reports of variants that could not be built, given their errors by precision."""
    return [VariantReport(precision=precision, status="failed", error=error) for precision, error in errors.items()]


@stage("assemble report", run_name="assemble-{version.name}")
def deploy_report(
    version: Version,
    evaluation: EvaluationSet,
    variants: Sequence[VariantReport],
    choice: Selection,
    *,
    budget: Sequence[str],
    description: str,
    champion_id: str | None,
    warnings: Sequence[str],
    unchanged: bool,
    statements: Sequence[Statement] = (),
) -> DeployReport:
    """Return the report of a version's qualification, with its history from the store.

    `champion_id` is its Foundry id as the champion, or None.
    """
    settings = workshop().settings
    explained = with_advice(with_reasons(in_order_of_size(variants), choice), version, evaluation)
    return DeployReport(
        name=version.name,
        version=version.number,
        status=overall_status(explained, choice, unchanged=unchanged),
        aliases=version.aliases,
        selected=choice.selected,
        reason=choice.reason,
        budget=tuple(budget),
        variants=explained,
        checkpoint=version.manifest.source.origin,
        parameters=version.manifest.source.parameters,
        evaluation=evaluation.summary,
        evaluation_rows=evaluation.rows,
        **reference_scores(explained),
        foundry_model_id=champion_id,
        foundry_dir=str(settings.foundry_dir),
        question=evaluation.proof_row.messages[-1].content,
        description=description,
        warnings=tuple(warnings),
        provenance=provenance_of(version.manifest),
        history=history_of(version, settings.threads),
        search=last_search(version),
        statements=tuple(statements),
    )


def built_report(
    version: Version,
    prepared: PreparedCheckpoint,
    evaluation: EvaluationSet,
    *,
    errors: Mapping[str, str],
    warnings: Sequence[str],
) -> DeployReport:
    """Return the report of a version that was built to be judged on another machine."""
    source = version.manifest.source
    built = [
        VariantReport.of(variant, "built").model_copy(update={"reason": "It is not judged yet."})
        for variant in version.variants
    ]
    provider = version.variants[0].execution_provider
    return DeployReport(
        name=version.name,
        version=version.number,
        status="failed" if errors else "built",
        aliases=version.aliases,
        reason=f"Judge it on a machine with {provider} and the same store: slmops regate {version.reference}",
        variants=tuple(in_order_of_size([*failures_of(errors), *built])),
        checkpoint=source.origin,
        parameters=source.parameters,
        evaluation=evaluation.summary,
        foundry_dir=str(workshop().settings.foundry_dir),
        warnings=tuple(warnings),
        provenance=provenance_of(version.manifest),
    )


def failed_report(
    request: DeployRequest, prepared: PreparedCheckpoint, evaluation: EvaluationSet, errors: Mapping[str, str]
) -> DeployReport:
    """Return the report of a deploy without a version, because no variant could be built."""
    return DeployReport(
        name=request.name,
        version=None,
        status="failed",
        variants=tuple(failures_of(errors)),
        checkpoint=request.checkpoint,
        parameters=prepared.inspection.parameters,
        evaluation=evaluation.summary,
        foundry_dir=str(workshop().settings.foundry_dir),
        description=request.description,
        warnings=prepared.inspection.warnings,
    )
