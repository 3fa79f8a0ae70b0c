"""transformers' prompts of conversations, by a tokenizer's chat template, and their tokens."""

import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

from slmops.infra.errors import reason_of
from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import Question
from slmops.infra.transformers.calls import (
    ControlTokenIds,
    RebuiltTokenizer,
    RenderConversations,
    RenderedConversation,
    RenderedConversations,
    Rendering,
)
from slmops.infra.transformers.tokenizer import auto_tokenizer, file_tokenizer, load_tokenizer, rebuilt_parts


def render(call: RenderConversations, progress: Progress) -> RenderedConversations:
    """Render conversations with a folder's tokenizer. The changes to this process are permanent.

    Raises `StageFailed` for a tokenizer that cannot be loaded.
    """
    # AutoTokenizer needs no torch, and importing torch would take longer than everything else here.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    progress(0, 1, "transformers")
    tokenizer = load_tokenizer(call.tokenizer_dir)
    rebuilt = _rebuilt(tokenizer, call)
    clock = _keep_time()
    conversations = {
        name: _rendered(
            tokenizer,
            Question(id=name, messages=messages, tools=call.tools.get(name, ())),
            clock,
            call.moments.get(name, ()),
        )
        for name, messages in call.conversations.items()
    }
    renderings = [rendering for conversation in conversations.values() for rendering in conversation.renderings]
    used = {token for rendering in renderings for token in rendering.ids}
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    marks = {mark for rendering in renderings for mark in re.findall(call.marks, rendering.text)}
    typed = [message["content"] for messages in call.conversations.values() for message in messages]
    marks -= {mark for text in typed for mark in re.findall(call.marks, text)}
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
        rebuilt=rebuilt,
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


def _rebuilt(tokenizer: Any, call: RenderConversations) -> RebuiltTokenizer | None:
    """Compare tokenizer.json's tokens with those of transformers' class, if the class splits texts differently."""
    folder = call.tokenizer_dir
    of_class = auto_tokenizer(folder)
    if call.save_dir:
        of_class.save_pretrained(call.save_dir)
    parts = rebuilt_parts(of_class, folder)
    if not parts:
        return None
    of_file = tokenizer if type(tokenizer) is not type(of_class) else file_tokenizer(folder)
    differing = []
    for name, messages in call.conversations.items():
        text = " ".join(message["content"] for message in messages)
        if _encode(of_class, text) != _encode(of_file, text):
            differing.append(name)
    return RebuiltTokenizer(
        class_name=type(of_class).__name__,
        parts=parts,
        follows_file=of_file is tokenizer,
        conversations=tuple(differing),
    )


def _rendered(tokenizer: object, asked: Question, clock: _Clock, moments: Sequence[str]) -> RenderedConversation:
    try:
        return RenderedConversation(renderings=tuple(_renderings(tokenizer, asked, clock, moments)))
    except Exception as error:  # a template is code of the checkpoint's author and may raise anything
        return RenderedConversation(refusal=reason_of(error, 0))


def _renderings(tokenizer: Any, asked: Question, clock: _Clock, moments: Sequence[str]) -> Iterator[Rendering]:
    for moment in moments or [datetime.now().isoformat()]:
        clock.moment, clock.asked = datetime.fromisoformat(moment), False
        text = tokenizer.apply_chat_template(
            list(asked.messages), tools=list(asked.tools) or None, tokenize=False, add_generation_prompt=True
        )
        yield Rendering(text=text, ids=_encode(tokenizer, text), dated=clock.asked)
        if not clock.asked:
            return


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    # The template itself writes the begin token, if the model has one.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
