"""What transformers makes of conversations: the prompt of a tokenizer's chat template, and its tokens."""

import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

from slmops.infra.errors import StageFailed
from slmops.infra.process.call import Progress


def render(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Render conversations with a folder's tokenizer; a child function, as it changes its process.

    Request: `tokenizer_dir`, `conversations` {name: messages}, `moments` {name: [local time, ISO 8601]}, the times at
    which a template that writes the date is to be rendered (none: the present), `marks` (a regular expression of
    what looks like a control token), `context` (what stands before and behind a control token).

    Result:
    - `conversations` {name: {renderings: [{text, ids, dated}]} or {refusal}}: one rendering, or one per moment of a
      template that asks for the date; `refusal` is the template's own error;
    - `dated`: whether some conversation's prompt has the date in it;
    - `control_tokens` {text: {id, alone, in_context}}: the added tokens whose id occurs in a rendering, and the ids of
      the text alone and in the context;
    - `marks` {text: number of tokens}: matches of `marks` in the renderings that are no added tokens;
    - `begin_token` (or null), `versions`.

    Raises `StageFailed` for a tokenizer that cannot be loaded.
    """
    # AutoTokenizer does without torch, and importing it takes longer than everything else here.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    progress(0, 1, "transformers")
    tokenizer = _load(request["tokenizer_dir"])
    clock = _keep_time()
    conversations: dict[str, Any] = {}
    for name, messages in request["conversations"].items():
        try:
            renderings = list(_renderings(tokenizer, messages, clock, request["moments"].get(name, [])))
            conversations[name] = {"renderings": renderings}
        except Exception as error:  # a template is a program of the checkpoint's author and may raise anything
            conversations[name] = {"refusal": (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")}
    rendered = [one for conversation in conversations.values() for one in conversation.get("renderings", [])]
    used = {token for one in rendered for token in one["ids"]}
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    marks = {mark for one in rendered for mark in re.findall(request["marks"], one["text"])}
    return {
        "conversations": conversations,
        "dated": any(one["dated"] for one in rendered),
        "control_tokens": {
            text: {
                "id": number,
                "alone": _encode(tokenizer, text),
                "in_context": _encode(tokenizer, text.join(request["context"])),
            }
            for text, number in added.items()
            if number in used
        },
        "marks": {mark: len(_encode(tokenizer, mark)) for mark in sorted(marks - set(added))},
        "begin_token": tokenizer.bos_token,
        "versions": {package: version(package) for package in ("transformers", "tokenizers")},
    }


class _Clock:
    """Stands in for `datetime` where transformers' `strftime_now` asks it for the time; `asked` says that it did."""

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


def _load(tokenizer_dir: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
        raise StageFailed(
            f"transformers cannot load the tokenizer in {tokenizer_dir}: {reason}.",
            "Load it with AutoTokenizer.from_pretrained and correct what that reports.",
        ) from error


def _renderings(
    tokenizer: Any, messages: Sequence[dict[str, str]], clock: _Clock, moments: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for moment in moments or [datetime.now().isoformat()]:
        clock.moment, clock.asked = datetime.fromisoformat(moment), False
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        yield {"text": text, "ids": _encode(tokenizer, text), "dated": clock.asked}
        if not clock.asked:
            return


def _encode(tokenizer: Any, text: str) -> list[int]:
    # The template writes the begin token itself where the model has one.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
