"""Template parity before the build. Rendering needs no weights, so a faulty template is found before a build."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.errors import BadInput
from slmops.infra.files import write_whole
from slmops.infra.genai.served_files import MENDS
from slmops.infra.process.call import OnProgress
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.manifest import digest_of, digest_of_file
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.exam import Bench
from slmops.tasks.exams.parity_runtimes import Conversations, ToolConversations
from slmops.tasks.exams.template_parity import (
    CALIBRATION,
    DECIDING_FILES,
    TemplateParity,
    check_checkpoint,
    runtime_versions,
)
from slmops.tasks.questions.chats import CONVERSATIONS
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.questions.tool_chats import tool_chats
from slmops.tasks.questions.tool_prompts import check_switch, form_for, prompt_of
from slmops.tasks.questions.training_rows import read_rows_file
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop

CHECK = "template_parity"


@stage("compare templates", run_name="compare-templates")
def check_templates(
    prepared: PreparedCheckpoint,
    rows: Sequence[EvaluationRow],
    calibration_file: str | None = None,
    allow: Sequence[str] = (),
) -> None:
    """Compare the prompts of a future variant with transformers, on built-in conversations and the user's own.

    An ONNX model is compared in its exams. Raises `BadInput` if they differ and `template_parity` is not allowed to
    fail.
    """
    template = read_chat_template(prepared.folder)
    form_for(template, rows)
    check_switch(template, rows)
    if prepared.inspection.kind == "genai":
        return
    shop = workshop()
    with stage_progress("compare templates") as on_progress:
        conversations = users_conversations(rows, calibration_file)
        chats = tool_conversations(rows, template)
        parity = parity_of(prepared.folder, conversations, shop.settings, on_progress, with_tools=chats)
    if CHECK not in allow:
        require_parity(parity, prepared.origin)


def require_parity(parity: TemplateParity, checkpoint: str) -> None:
    """Raise `BadInput` with the first difference and its cause, if the runtimes render other prompts."""
    if not parity.holds:
        raise BadInput(
            f"The runtimes do not render the prompts that the model was trained with. {parity.cause}",
            "In use the model would see prompts that it was not trained with. Change chat_template.jinja there (or "
            "`chat_template` of tokenizer_config.json), and compare in seconds: "
            f"{shlex.join(('slmops', 'check', checkpoint))}\n"
            "Or deploy with --chat-template FILE, a template that all render alike; or allow the difference with "
            f"--allow {CHECK}.",
            code="template-parity",
        )


def tool_conversations(rows: Sequence[EvaluationRow], template: str | None) -> ToolConversations:
    """Return the prompts of evaluation rows with tools, by name, and the built-in ones; none without such rows."""
    asked = {f"row {row.id}": row for row in rows if row.tools}
    if not asked:
        return {}
    return {name: prompt_of(row, template) for name, row in (tool_chats() | asked).items()}


def users_conversations(rows: Sequence[EvaluationRow], calibration_file: str | None = None) -> Conversations:
    """Return the prompts of evaluation rows without tools and of the calibration file's chats, by name."""
    found = {f"row {row.id}": tuple(turn.model_dump() for turn in row.messages) for row in rows if not row.tools}
    chats = read_rows_file(Path(calibration_file).expanduser(), calibration_file) if calibration_file else []
    for number, chat in enumerate(chats, 1):
        found[f"{CALIBRATION} {number}"] = tuple(turn.model_dump() for turn in chat.messages[:-1])
    return found


def parity_of(
    checkpoint: Path,
    conversations: Conversations,
    settings: Settings,
    on_progress: OnProgress | None = None,
    *,
    with_tools: ToolConversations | None = None,
) -> TemplateParity:
    """Return the comparison of a checkpoint's prompts; it is made once for equal files, conversations and versions."""
    deciding = [path for path in sorted(checkpoint.iterdir()) if path.name in DECIDING_FILES]
    asked = {
        "files": {path.name: digest_of_file(path) for path in deciding},
        "template": read_chat_template(checkpoint),
        "conversations": {**CONVERSATIONS, **conversations},
        "versions": runtime_versions(),
        "mends": MENDS,
        **({"with_tools": with_tools} if with_tools else {}),
    }
    record = settings.user_cache_dir / "parity" / f"{digest_of(asked)}.json"
    if record.is_file():
        return TemplateParity.model_validate_json(record.read_bytes())
    with work_folder(settings) as work:
        parity = check_checkpoint(settings, Bench(checkpoint, work, on_progress), conversations, with_tools or {})
    write_whole(record, parity.model_dump_json())
    return parity
