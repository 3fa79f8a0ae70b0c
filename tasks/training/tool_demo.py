"""The data of the tool demo: the demo's commands, answered by calls of functions.

The training starts from the demo's checkpoint, as a fine-tune starts from a base model. It keeps the commands and their
split, and asks for calls in Hermes' form in place of JSON actions. Without tools the answers stay JSON actions.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slmops.infra.records import Json

Row = dict[str, Any]

TRAIN_ROWS = 2400
FOREIGN = ("alarm", "fan", "music", "timer", "vacuum", "volume")  # the demo's commands that no tool does
POLITE = re.compile(r"^(please|hey|ok)\b|\b(please|now|thanks)$")
# As long as a call: rows are batched by their lengths, and a batch should hold both.
NO_TOOL = "I have no tool for that. I can set lights, temperatures and locks."
RESULTS = {"ok": "Done.", "failed": "That did not work."}

# By the categories of the Berkeley Function Calling Leaderboard, where several tools are on offer: their share of the
# training rows, and how many held-out rows they have.
SHARES: Mapping[str, float] = {
    "multiple": 0.32,
    "parallel_multiple": 0.17,
    "multi_turn": 0.25,
    "irrelevance": 0.15,
    "no_tools": 0.11,
}
HELD_OUT_ROWS: Mapping[str, int] = {
    "no_tools": 20,
    "multiple": 80,
    "parallel_multiple": 20,
    "multi_turn": 40,
    "irrelevance": 20,
}


def _function(name: str, description: str, **properties: Json) -> Row:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: Sequence[Row] = (
    _function("set_light", "Switch the light of a room.", room={"type": "string"}, on={"type": "boolean"}),
    _function("set_temperature", "Heat a room.", room={"type": "string"}, degrees={"type": "integer"}),
    _function("set_lock", "Lock or unlock a door.", door={"type": "string"}, locked={"type": "boolean"}),
)

# ChatML with Hermes' marks of calls. Tools are written as signatures, and calls without spaces: they need few tokens.
CHAT_TEMPLATE = (
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- for tool in tools %}"
    "{{- tool.function.name + '(' }}"
    "{%- for name, schema in tool.function.parameters.properties.items() %}"
    "{%- if not loop.first %}{{- ', ' }}{%- endif %}{{- name }}"
    "{%- endfor %}"
    "{{- ')\\n' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'<tool_call>{"name":"\' + call.function.name + \'","arguments":{\' }}'
    "{%- for name, value in call.function.arguments.items() %}"
    "{%- if not loop.first %}{{- ',' }}{%- endif %}{{- '\"' + name + '\":' }}{{- value | tojson }}"
    "{%- endfor %}"
    "{{- '}}</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# What differs from the demo's own training.
TRAINING: Mapping[str, Any] = {
    "chat_template": CHAT_TEMPLATE,
    "added_tokens": ("<tool_call>", "</tool_call>"),
    "prompt_loss_weight": 0.02,
    "epochs": 2,
    "attention_learning_rate": None,
    "batch_size": 8,  # longer rows, and few of them: a batch of 16 would leave half of the steps
    "max_new_tokens": 80,
    "min_exact_match": 0.9,
}


def tool_rows(
    train_rows: Sequence[Row], held_out_rows: Sequence[Row], chooser: random.Random
) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows) made of the demo's own rows of these two kinds.

    A row is `{id, messages, tools, expected, category}`, with `expected_tool_calls` where calls are due or none is.
    """
    seen, unseen = _Commands(train_rows, chooser), _Commands(held_out_rows, chooser)
    chosen = chooser.choices(list(SHARES), list(SHARES.values()), k=TRAIN_ROWS)
    held_out = [category for category, count in HELD_OUT_ROWS.items() for _ in range(count)]
    return (
        [{"id": f"train-{number:05}", **seen.row(category)} for number, category in enumerate(chosen, 1)],
        [{"id": f"held-out-{number:05}", **unseen.row(category)} for number, category in enumerate(held_out, 1)],
    )


def evaluation_lines(rows: Sequence[Row]) -> list[Row]:
    """Return the lines of an evaluation file: the rows without tools, a line with the tools, and the rows with them."""
    lines = [{key: value for key, value in row.items() if key != "tools"} for row in rows]
    for line in lines:
        if "expected_tool_calls" in line:
            del line["expected"]
    plain = [line for line, row in zip(lines, rows, strict=True) if not row["tools"]]
    return [*plain, {"tools": list(TOOLS)}, *(line for line in lines if line not in plain)]


def call_for(action: Json) -> Json | None:
    """Return the call of a tool that does what a JSON action of the demo says; None if no tool does."""
    device, verb = action["device"], action["action"]
    if device == "light" and verb in ("on", "off"):
        return {"name": "set_light", "arguments": {"room": action["room"], "on": verb == "on"}}
    if device == "thermostat":
        return {"name": "set_temperature", "arguments": {"room": action["room"], "degrees": action["temperature"]}}
    if device == "lock":
        return {"name": "set_lock", "arguments": {"door": action["door"], "locked": verb == "lock"}}
    return None


class _Commands:
    """The commands of some of the demo's rows, of which it makes rows with tools."""

    def __init__(self, rows: Sequence[Row], chooser: random.Random) -> None:
        self._rows = rows
        self._chooser = chooser
        calls = [(row["messages"][0]["content"], call_for(json.loads(row["expected"]))) for row in rows]
        self._with_call = [(text, call) for text, call in calls if call]
        self._without = [row["messages"][0]["content"] for row in rows if row["category"] in FOREIGN]

    def row(self, category: str) -> Row:
        """Make a row of a category."""
        makers: dict[str, Callable[[], Row]] = {
            "multiple": lambda: self._calling(self._any_command()),
            "parallel_multiple": lambda: self._calling(self._of_two_tools()),
            "multi_turn": self._in_conversation,
            "irrelevance": self._irrelevant,
            "no_tools": self._plain,
        }
        return {"tools": list(TOOLS), **makers[category](), "category": category}

    def _calling(self, commands: Sequence[tuple[str, Json]]) -> Row:
        text = " and ".join(said.rstrip(".") for said, _ in commands) if len(commands) > 1 else commands[0][0]
        calls = [call for _, call in commands]
        written = "".join(f"<tool_call>{json.dumps(call, separators=(',', ':'))}</tool_call>" for call in calls)
        return {"messages": [_said("user", text)], "expected": written, "expected_tool_calls": calls}

    def _any_command(self) -> list[tuple[str, Json]]:
        return [self._chooser.choice(self._with_call)]

    def _of_two_tools(self) -> list[tuple[str, Json]]:
        short = [command for command in self._with_call if not POLITE.search(command[0].lower().rstrip("."))]
        first = self._chooser.choice(short)
        others = [command for command in short if command[1]["name"] != first[1]["name"]]
        return [first, self._chooser.choice(others)]

    def _in_conversation(self) -> Row:
        """Make a row behind up to two earlier requests: either a result waits for its text, or a request for a call."""
        earlier = [turn for _ in range(self._chooser.choice((0, 1, 2))) for turn in self._exchange()]
        if not earlier or self._chooser.random() < 0.5:
            *asked, said = self._exchange()
            return {"messages": [*earlier, *asked], "expected": said["content"]}
        row = self._irrelevant() if self._chooser.random() < 0.2 else self._calling(self._any_command())
        return {**row, "messages": [*earlier, *row["messages"]]}

    def _exchange(self) -> list[Row]:
        """Return a request, its call, the call's result, and the text on it."""
        (text, call), result = self._chooser.choice(self._with_call), self._chooser.choice(list(RESULTS))
        made = {"id": "call00001", "type": "function", "function": call}
        called = {**_said("assistant", ""), "tool_calls": [made]}
        answered = {**_said("tool", result), "tool_call_id": "call00001"}
        return [_said("user", text), called, answered, _said("assistant", RESULTS[result])]

    def _irrelevant(self) -> Row:
        text = self._chooser.choice(self._without)
        return {"messages": [_said("user", text)], "expected": NO_TOOL, "expected_tool_calls": []}

    def _plain(self) -> Row:
        row = self._chooser.choice(self._rows)
        return {"messages": row["messages"], "expected": row["expected"], "tools": []}


def _said(role: str, text: str) -> Row:
    return {"role": role, "content": text}
