"""`slmops check` of a checkpoint: what its files say, and whether the runtimes make its prompts."""

from pathlib import Path

from slmops.infra.checkpoints.source import SourceKind, parse_checkpoint
from slmops.infra.settings import Settings
from slmops.infra.transformers.adapters import read_adapter_config
from slmops.tasks.checkpoint.adapter_base import inspect_for_merge, usable_base
from slmops.tasks.checkpoint.from_gguf import from_gguf
from slmops.tasks.checkpoint.inspection import Inspection, inspect_checkpoint
from slmops.tasks.checkpoint.rewriting import without_marks
from slmops.tasks.environment.checks import Check
from slmops.tasks.exams.early_parity import parity_of
from slmops.tasks.exams.planned_statements import planned_statements
from slmops.tasks.exams.statements import Statement, statements_of


def check_files(settings: Settings, checkpoint: str | None) -> tuple[list[Check], tuple[Statement, ...]]:
    """Return the rows on a checkpoint's prompts and the facts in its files; of an adapter only facts.

    Raises `BadInput` when the checkpoint cannot be deployed anywhere.
    """
    if checkpoint is None:
        return [], ()
    folder = from_gguf(without_marks(Path(checkpoint).expanduser(), settings), settings)
    inspection = inspect_checkpoint(folder)
    if inspection.kind == "adapter":
        return [], _facts_of_adapter(folder, inspection)
    if inspection.kind != "checkpoint":
        return [], ()
    parity = parity_of(folder, {}, settings)
    found = parity.cause or f"{parity.conversations} conversations have the same tokens"
    advice = "" if parity.holds else "Give a template that the runtimes render alike: deploy --chat-template FILE."
    needed = "transformers' tokens in the runtimes"
    checks = [Check(name="prompts", required=needed, found=found, ok=parity.holds, what_to_do=advice)]
    checks += [Check(name="prompts", required="no remarks", found=note, ok=True) for note in parity.notes]
    return checks, statements_of(folder, inspection)


def _facts_of_adapter(adapter: Path, inspection: Inspection) -> tuple[Statement, ...]:
    """Return the facts of the merged model, or of the adapter alone if its base is not on this machine."""
    named = read_adapter_config(adapter)
    if named is None:
        return planned_statements(adapter, inspection)
    with usable_base(named):
        source = parse_checkpoint(named)
    if source.kind is not SourceKind.LOCAL:
        return planned_statements(adapter, inspection)
    base = Path(source.location)
    return planned_statements(adapter, inspect_for_merge(adapter, base), base=base)
