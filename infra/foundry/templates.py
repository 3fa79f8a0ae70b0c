"""What Foundry Local makes of conversations: how many tokens their prompts have. The runtime tells no more of them."""

from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmops.infra.errors import StageFailed
from slmops.infra.foundry.runtime import SDK, count_prompt_tokens, open_folder
from slmops.infra.process.call import Progress


def count(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Count the tokens of conversations' prompts with a model folder that is registered nowhere.

    Request: `model_dir`, `cache_dir` (an empty throw-away directory), `conversations` {name: messages}.

    Result: `conversations` {name: {prompt_tokens, moments} or {error, moments}}; `moments` are the local times,
    ISO 8601, right before and after; `versions`.

    Raises `StageFailed` when the runtime does not start or does not load the folder.
    """
    progress(0, 1, "Foundry Local")
    model = open_folder(Path(request["model_dir"]), Path(request["cache_dir"]))
    conversations = {name: _counted(model, messages) for name, messages in request["conversations"].items()}
    return {"conversations": conversations, "versions": {SDK: version(SDK)}}


def _counted(model: Any, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
    counted: dict[str, Any]
    started = datetime.now()
    try:
        counted = {"prompt_tokens": count_prompt_tokens(model, messages)}
    except StageFailed as error:
        counted = {"error": error.message}
    return {**counted, "moments": [started.isoformat(), datetime.now().isoformat()]}
