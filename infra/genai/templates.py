"""What onnxruntime-genai makes of conversations: the prompt of a folder's chat template, and its tokens."""

import json
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

from slmops.infra.process.call import Progress


def render(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Render conversations with a model folder's tokenizer; the model itself is not loaded.

    Request: `model_dir`, `conversations` {name: messages}, `control_tokens` [text], `context` (what stands before and
    behind a control token), `compositions` {name: text}.

    Result:
    - `fault`: why the runtime cannot open the tokenizer (then nothing else is given), or null;
    - `conversations` {name: {text, ids, moments} or {error, moments}}; `moments` are the local times, ISO 8601, right
      before and after;
    - `control_tokens` {text: {alone, in_context}}: ids of the text alone and in the context;
    - `compositions` {name: ids}, with the special tokens that the tokenizer itself puts around a text;
    - `versions`.
    """
    import onnxruntime_genai as og

    progress(0, 1, "onnxruntime-genai")
    versions = {"onnxruntime-genai": version("onnxruntime-genai")}
    try:
        tokenizer = og.Tokenizer(request["model_dir"])
    except Exception as error:  # the binding raises RuntimeError and, for some faults, bare exceptions
        return {"fault": _reason(error), "versions": versions}
    before, behind = request["context"]
    conversations = {name: _rendering(tokenizer, messages) for name, messages in request["conversations"].items()}
    control_tokens = {
        text: {"alone": _encode(tokenizer, text), "in_context": _encode(tokenizer, before + text + behind)}
        for text in request["control_tokens"]
    }
    tokenizer.update_options(add_special_tokens="true")
    return {
        "fault": None,
        "conversations": conversations,
        "control_tokens": control_tokens,
        "compositions": {name: _encode(tokenizer, text) for name, text in request["compositions"].items()},
        "versions": versions,
    }


def _rendering(tokenizer: Any, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
    started = datetime.now()
    try:
        text = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        rendered = {"text": text, "ids": _encode(tokenizer, text)}
    except Exception as error:  # see above
        rendered = {"error": _reason(error)}
    return {**rendered, "moments": [started.isoformat(), datetime.now().isoformat()]}


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text)]


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":. ")
