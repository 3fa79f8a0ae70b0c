"""The flow `regate`: judge a stored version again, without building it."""

from prefect import State, flow

from flows.qualify import Gate, Qualification, ended, qualify
from infra.settings import load_settings
from infra.storage.opening import open_registry
from infra.storage.registry import parse_reference
from tasks.checkpoint import prepare_source
from tasks.evaluate import last_evaluation_set, needs_reference
from tasks.evaluation_set import read_evaluation
from tasks.report.records import DeployReport


@flow(name="regate", flow_run_name="regate-{reference}")
def regate(
    reference: str,
    evaluation_file: str | None = None,
    min_top1_agreement: float | None = None,
    max_kl_divergence: float | None = None,
    max_quality_loss: float | None = None,
) -> State[DeployReport]:
    """Judge a stored version by other thresholds or rows, and register or unregister its variants accordingly.

    Args:
        reference: The version, NAME@VERSION.
        evaluation_file: JSONL rows {id, messages, expected}; default: the rows of the last evaluation.
        min_top1_agreement: Gate: smallest share of positions with the reference's most likely token (0 to 1).
        max_kl_divergence: Gate: largest mean KL divergence from the reference, in nats per token.
        max_quality_loss: Gate: largest drop of the share of exact answers below the reference's (0 to 1).

    Returns:
        The report, in the states that `deploy` ends in.
    """
    settings = load_settings()
    registry = open_registry(settings)
    name, number = parse_reference(reference)
    manifest = registry.version(name, number)
    evaluation = last_evaluation_set(manifest, registry) if evaluation_file is None else None
    if evaluation is None:
        evaluation = read_evaluation(evaluation_file, None, settings)
    prepared = prepare_source(manifest, settings) if needs_reference(manifest, evaluation, registry, settings) else None
    version = Qualification(
        manifest=manifest,
        evaluation=evaluation,
        gate=Gate(min_top1_agreement, max_kl_divergence, max_quality_loss),
        description=str((registry.latest_evidence(manifest, "deploy") or {}).get("description", "")),
        promote=False,
        registry=registry,
        settings=settings,
    )
    return ended(qualify(version, prepared, [], ()))
