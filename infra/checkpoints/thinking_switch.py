"""The switch of a chat template: a variable that turns the model's thoughts on and off."""

from dataclasses import dataclass

from pydantic import JsonValue

from slmops.infra.checkpoints.chat_template import parse_chat_template


@dataclass(frozen=True)
class ThinkingSwitch:
    """A chat template's variable that turns thoughts on and off, and its values."""

    variable: str
    on: JsonValue
    off: JsonValue

    def prefix(self, *, thinks: bool) -> str:
        """Return Jinja that, before the template, sets a mode: for runtimes that give templates no variables."""
        value = self.on if thinks else self.off
        literal = f'"{value}"' if isinstance(value, str) else str(value).lower()
        return f"{{%- set {self.variable} = {literal} -%}}"


# In this order: DeepSeek V3.1 sets `thinking` by `enable_thinking`.
_SWITCHES = (
    ThinkingSwitch("enable_thinking", on=True, off=False),
    ThinkingSwitch("thinking", on=True, off=False),  # Granite 3, DeepSeek V3.1
    ThinkingSwitch("thinking_mode", on="enabled", off="disabled"),  # MiniMax M3
    ThinkingSwitch("thinking_budget", on=-1, off=0),  # Seed-OSS, in tokens
)


def thinking_switch(template: str | None) -> ThinkingSwitch | None:
    """Return the switch of a chat template, or None if it has none; raises `BadInput` for one that is not Jinja."""
    from jinja2 import nodes

    if not template:
        return None
    read = {name.name for name in parse_chat_template(template).find_all(nodes.Name)}
    return next((switch for switch in _SWITCHES if switch.variable in read), None)
