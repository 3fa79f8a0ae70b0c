"""onnxruntime-genai's prompts of conversations, by a folder's chat template, and their tokens."""

from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

from slmops.infra.errors import reason_of
from slmops.infra.genai.calls import EncodedToken, RenderChats, RenderedChat, RenderedChats
from slmops.infra.genai.runtime import render_chat
from slmops.infra.process.call import Progress
from slmops.infra.records import Json
from slmops.infra.reference.answers import Message


def render(call: RenderChats, progress: Progress) -> RenderedChats:
    """Render conversations with a model folder's tokenizer; the model itself is not loaded."""
    import onnxruntime_genai as og

    progress(0, 1, "onnxruntime-genai")
    versions = {"onnxruntime-genai": version("onnxruntime-genai")}
    try:
        tokenizer = og.Tokenizer(str(call.model_dir))
    except Exception as error:  # the binding raises RuntimeError and, for some faults, bare exceptions
        return RenderedChats(fault=reason_of(error, 0), versions=versions)
    before, behind = call.context
    conversations = {
        name: _rendering(tokenizer, messages, call.tools.get(name, ())) for name, messages in call.conversations.items()
    }
    control_tokens = {
        text: EncodedToken(alone=_encode(tokenizer, text), in_context=_encode(tokenizer, before + text + behind))
        for text in call.control_tokens
    }
    tokenizer.update_options(add_special_tokens="true")
    return RenderedChats(
        conversations=conversations,
        control_tokens=control_tokens,
        compositions={name: _encode(tokenizer, text) for name, text in call.compositions.items()},
        versions=versions,
    )


def _rendering(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Json]) -> RenderedChat:
    started = datetime.now().isoformat()
    text, ids, reason = "", None, None
    try:
        text = render_chat(tokenizer, messages, tools)
        ids = _encode(tokenizer, text)
    except Exception as error:  # see above
        reason = reason_of(error, 0)
    return RenderedChat(text=text, ids=ids, error=reason, moments=(started, datetime.now().isoformat()))


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(int(token) for token in tokenizer.encode(text))
