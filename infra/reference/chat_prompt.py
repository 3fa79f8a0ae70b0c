"""Chats of any length in tokens, the same for a checkpoint and its variants."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from slmops.infra.reference.answers import Message

BENCHMARK_TEXT = "The quick brown fox jumps over the lazy dog, and then it rests in the warm sun for a while. "


@dataclass(frozen=True)
class ChatPrompt:
    """Chats of any length: the chat template's text before and after the user's text, and text to fill the chat."""

    before: NDArray[np.int32]
    after: NDArray[np.int32]
    text: NDArray[np.int32]

    def of_length(self, length: int) -> NDArray[np.int32] | None:
        """Token ids of a chat of exactly `length` tokens; None if the template alone has as many."""
        room = length - len(self.before) - len(self.after)
        return np.concatenate([self.before, np.resize(self.text, room), self.after]) if room > 0 else None


def find_chat_prompt(render: Callable[[Sequence[Message]], Sequence[int]], text_ids: Sequence[int]) -> ChatPrompt:
    """Find the template's text as the common part of two chats.

    `render` returns the token ids of a chat's prompt, `text_ids` are those of `BENCHMARK_TEXT`.
    """
    chats = [render([{"role": "user", "content": text}]) for text in ("The quick brown fox", "345 und")]
    before = sum(1 for _ in takewhile(_alike, zip(*chats, strict=False)))
    rest = [reversed(chat[before:]) for chat in chats]
    after = sum(1 for _ in takewhile(_alike, zip(*rest, strict=False)))
    ids = np.asarray(chats[0], np.int32)
    return ChatPrompt(before=ids[:before], after=ids[len(ids) - after :], text=np.asarray(text_ids, np.int32))


def _alike(pair: tuple[int, ...]) -> bool:
    return pair[0] == pair[1]
