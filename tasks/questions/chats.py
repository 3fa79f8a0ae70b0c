"""Conversations for comparing renderings of a chat template: `chats.jsonl`, one per line.

Each ends with a user's message, because the prompt for an answer is compared. None contains anything that
looks like a control token (`MARKS`), except for the marks of thoughts.
"""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from slmops.infra.reference.answers import Message

# What looks like a control token: <|user|>, <s>, </s>, <<SYS>>, [INST].
MARKS = r"<\|[^\s<>|]+\|>|<<?/?[A-Za-z_]+>>?|\[/?[A-Z_]+\]"
# A control token is also looked for inside a text.
CONTEXT = ("a ", " b")
# Categories of Unicode whose characters outside ASCII are rare: numbers, symbols, spaces and control characters.
RARE = ("N", "S", "Z", "C")

_CHATS = [json.loads(line) for line in Path(__file__).with_name("chats.jsonl").read_text("utf-8").splitlines()]
CONVERSATIONS: dict[str, tuple[Message, ...]] = {chat["name"]: tuple(chat["messages"]) for chat in _CHATS}
# Text that runtimes treat differently with every model and template. It is noted, but is no reason to reject.
NOTED_ONLY: dict[str, str] = {chat["name"]: chat["told_only"] for chat in _CHATS if "told_only" in chat}


def rare_characters(messages: Sequence[Message]) -> list[str]:
    """Return the characters outside ASCII in a conversation that are neither letters, marks nor punctuation."""
    texts = "".join(message["content"] for message in messages)
    return [
        character
        for character in dict.fromkeys(texts)
        if not character.isascii() and unicodedata.category(character)[0] in RARE
    ]


def without_rare_characters(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """Return a conversation with a letter in place of each rare character, or None if it has none."""
    letters = dict.fromkeys(map(ord, rare_characters(messages)), "x")
    replaced = (dict(message) | {"content": message["content"].translate(letters)} for message in messages)
    return tuple(replaced) if letters else None


def plain_name(name: str) -> str:
    """Return the name of a conversation without its rare characters."""
    return f"{name}, without rare characters"
