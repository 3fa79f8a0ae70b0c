"""The flow `regate`: judge a stored version again, without building it."""

from collections.abc import Sequence

from prefect import State, flow

from slmops.flows.qualify import Gate, Qualification, ended, needs_source, qualify
from slmops.infra.errors import BadInput
from slmops.infra.settings import load_settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.build.build import torch_process
from slmops.tasks.checkpoint.preparation import prepare_source
from slmops.tasks.exams.answers import last_evaluation_set
from slmops.tasks.exams.text import read_text
from slmops.tasks.questions.evaluation_set import read_evaluation
from slmops.tasks.report.records import DeployReport
from slmops.tasks.request.budget import parse_budget
from slmops.tasks.request.inputs import local_file
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.commit import last_budget


@flow(name="regate", flow_run_name="regate-{reference}")
@ends_by_its_errors
def regate(
    reference: str,
    evaluation_file: str | None = None,
    scorer: str | None = None,
    output_schema_file: str | None = None,
    output_regex: str | None = None,
    text_file: str | None = None,
    budget: Sequence[str] | None = None,
    min_top1_agreement: float | None = None,
    max_kl_divergence: float | None = None,
    max_quality_loss: float | None = None,
) -> State[DeployReport]:
    """Judge a stored version by other thresholds or rows, and register or unregister its variants accordingly.

    Args:
        reference: The version, NAME@VERSION.
        evaluation_file: JSONL rows {id, messages, expected}; default: the rows of the last evaluation.
        scorer: How an answer is scored where its row in `evaluation_file` does not say.
        output_schema_file: JSON Schema that every answer must conform to; with `evaluation_file`.
        output_regex: Regular expression that every answer must match as a whole; with `evaluation_file`.
        text_file: UTF-8 text on which perplexity and distributions are compared too.
        budget: Limits of the chosen variant, each KEY=VALUE; default: those of the last choice.
        min_top1_agreement: Gate: smallest share of positions with the reference's most likely token (0 to 1).
        max_kl_divergence: Gate: largest mean KL divergence from the reference, in nats per token.
        max_quality_loss: Gate: largest drop of the task score below the reference's (0 to 1).

    Returns:
        The report, in the states that `deploy` ends in.
    """
    settings = load_settings()
    evaluation_file, output_schema_file, text_file = (
        local_file(text, settings) if text else None for text in (evaluation_file, output_schema_file, text_file)
    )
    registry = open_registry(settings)
    manifest = registry.find(reference)
    limits = last_budget(manifest, registry) if budget is None else tuple(budget)
    parse_budget(limits)
    asked = {"scorer": scorer, "output_schema_file": output_schema_file, "output_regex": output_regex}
    if evaluation_file is None and any(asked.values()):
        raise BadInput("A scorer or an output format is named without an evaluation file.", "Name its file too.")
    evaluation = last_evaluation_set(manifest, registry) if evaluation_file is None else None
    if evaluation is None:
        evaluation = read_evaluation(evaluation_file, None, settings, **asked)
    text = read_text(text_file, settings) if text_file else None
    with torch_process(settings) as torch_child:
        version = Qualification(
            manifest=manifest,
            prepared=prepare_source(manifest, settings)
            if needs_source(manifest, evaluation, text, registry, settings)
            else None,
            evaluation=evaluation,
            text=text,
            gate=Gate(min_top1_agreement, max_kl_divergence, max_quality_loss),
            budget=limits,
            description=str((registry.latest_evidence(manifest, "deploy") or {}).get("description", "")),
            promote=False,
            registry=registry,
            settings=settings,
            torch_child=torch_child,
        )
        return ended(qualify(version, [], ()))
