"""transformers' prompts of conversations, by a tokenizer's chat template, and their tokens."""

import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmops.infra.errors import StageFailed, reason_of
from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import Message
from slmops.infra.transformers.calls import (
    ControlTokenIds,
    RenderConversations,
    RenderedConversation,
    RenderedConversations,
    Rendering,
)


def render(call: RenderConversations, progress: Progress) -> RenderedConversations:
    """Render conversations with a folder's tokenizer. The changes to this process are permanent.

    Raises `StageFailed` for a tokenizer that cannot be loaded.
    """
    # AutoTokenizer needs no torch, and importing torch would take longer than everything else here.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    progress(0, 1, "transformers")
    tokenizer = _load(call.tokenizer_dir)
    clock = _keep_time()
    conversations = {
        name: _rendered(tokenizer, messages, clock, call.moments.get(name, ()))
        for name, messages in call.conversations.items()
    }
    renderings = [rendering for conversation in conversations.values() for rendering in conversation.renderings]
    used = {token for rendering in renderings for token in rendering.ids}
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    marks = {mark for rendering in renderings for mark in re.findall(call.marks, rendering.text)}
    return RenderedConversations(
        conversations=conversations,
        dated=any(rendering.dated for rendering in renderings),
        control_tokens={
            text: ControlTokenIds(
                id=number, alone=_encode(tokenizer, text), in_context=_encode(tokenizer, text.join(call.context))
            )
            for text, number in added.items()
            if number in used
        },
        marks={mark: len(_encode(tokenizer, mark)) for mark in sorted(marks - set(added))},
        begin_token=tokenizer.bos_token,
        versions={package: version(package) for package in ("transformers", "tokenizers")},
    )


class _Clock:
    """Replaces `datetime` in transformers' `strftime_now`; `asked` is true after a request for the time."""

    def __init__(self) -> None:
        self.moment = datetime.now()
        self.asked = False

    def now(self) -> datetime:
        self.asked = True
        return self.moment


def _keep_time() -> _Clock:
    from transformers.utils import chat_template_utils

    clock = _Clock()
    chat_template_utils.datetime = clock
    return clock


def _load(tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise StageFailed(
            f"transformers cannot load the tokenizer in {tokenizer_dir}: {reason_of(error, -1)}.",
            "Load it with AutoTokenizer.from_pretrained and correct the reported fault.",
            code="tokenizer-does-not-load",
        ) from error


def _rendered(
    tokenizer: object, messages: Sequence[Message], clock: _Clock, moments: Sequence[str]
) -> RenderedConversation:
    try:
        return RenderedConversation(renderings=tuple(_renderings(tokenizer, messages, clock, moments)))
    except Exception as error:  # a template is code of the checkpoint's author and may raise anything
        return RenderedConversation(refusal=reason_of(error, 0))


def _renderings(
    tokenizer: Any, messages: Sequence[Message], clock: _Clock, moments: Sequence[str]
) -> Iterator[Rendering]:
    for moment in moments or [datetime.now().isoformat()]:
        clock.moment, clock.asked = datetime.fromisoformat(moment), False
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        yield Rendering(text=text, ids=_encode(tokenizer, text), dated=clock.asked)
        if not clock.asked:
            return


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    # The template itself writes the begin token, if the model has one.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
