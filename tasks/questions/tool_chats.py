"""Built-in conversations with tools, for comparing renderings of a chat template: `tool_chats.jsonl`, one per line."""

from functools import cache
from pathlib import Path

from slmops.tasks.questions.evaluation_set import EvaluationRow


@cache
def tool_chats() -> dict[str, EvaluationRow]:
    """Return the conversations by name: tools, parallel calls, their results, and an answer to them."""
    lines = Path(__file__).with_name("tool_chats.jsonl").read_text("utf-8").splitlines()
    return {str(row.id): row for row in map(EvaluationRow.model_validate_json, lines)}
