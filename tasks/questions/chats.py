"""Conversations for comparing renderings of a chat template: `chats.jsonl`, one per line.

Each ends with a user's message, because the prompt for an answer is compared. None contains anything that
looks like a control token (`MARKS`).
"""

import json
from pathlib import Path

from slmops.infra.reference.answers import Message

# What looks like a control token: <|user|>, <s>, </s>, <<SYS>>, [INST].
MARKS = r"<\|[^\s<>|]+\|>|<<?/?[A-Za-z_]+>>?|\[/?[A-Z_]+\]"
# A control token is also looked for inside a text.
CONTEXT = ("a ", " b")

_CHATS = [json.loads(line) for line in Path(__file__).with_name("chats.jsonl").read_text("utf-8").splitlines()]
CONVERSATIONS: dict[str, tuple[Message, ...]] = {chat["name"]: tuple(chat["messages"]) for chat in _CHATS}
# Text that runtimes treat differently with every model and template. It is noted, but is no reason to reject.
NOTED_ONLY: dict[str, str] = {chat["name"]: chat["told_only"] for chat in _CHATS if "told_only" in chat}
