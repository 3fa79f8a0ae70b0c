"""What a model folder can do beyond plain answers: calls of tools in its own form, and thoughts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.checkpoints.thinking_switch import thinking_switch
from slmops.infra.checkpoints.vocabulary import added_tokens
from slmops.infra.reasoning import ThoughtMarks, thought_marks
from slmops.infra.tool_calls.call import Form
from slmops.infra.tool_calls.forms import form_of, takes_tools

# The variable that the runtime sets for a request.
RUNTIME_SWITCH = "enable_thinking"


@dataclass(frozen=True)
class Abilities:
    """A model's abilities, found by its chat template.

    `form` is the form of its calls, None if it is not known; `marks` are those of its thoughts, which its prompts may
    have `opened`; `has_switch` says whether a request can turn thoughts off. `tokens` are the added tokens' ids.
    """

    takes_tools: bool = False
    form: Form | None = None
    marks: ThoughtMarks | None = None
    opened: bool = False
    has_switch: bool = False
    tokens: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The words of Foundry's catalog for these abilities."""
        calls_tools, thinks = self.takes_tools and self.form is not None, self.marks is not None
        return tuple(word for word, has in (("tool-calling", calls_tools), ("reasoning", thinks)) if has)

    @property
    def call_marks(self) -> tuple[str, str] | None:
        """The marks before and after calls, if the form has both."""
        frame = self.form.frame if self.form else None
        return (frame.opening, frame.closing) if frame and frame.opening and frame.closing else None

    @property
    def properties(self) -> dict[str, str | int]:
        """What the runtime reads of a local registration: capabilities, and marks of thoughts and calls.

        With the marks of thoughts, its sessions give thoughts apart from the answer.
        """
        found: dict[str, str | int] = {}
        if self.capabilities:
            found["capabilities"] = ",".join(self.capabilities)
        if "tool-calling" in self.capabilities:
            found["supports_tool_calling"] = 1
        if self.simple_marks:
            marks = {"reasoning_start": self.simple_marks.start, "reasoning_end": self.simple_marks.end}
            found |= {"supports_reasoning": 1, **marks}
        if self.call_marks:
            found |= dict(zip(("tool_call_start", "tool_call_end"), self.call_marks, strict=True))
        return found

    @property
    def simple_marks(self) -> ThoughtMarks | None:
        """The marks, if the runtime can find thoughts by them: it knows one start and one end."""
        return self.marks if self.marks and not self.marks.continued else None


def abilities_of(folder: Path, prompt: str = "") -> Abilities:
    """Return a model folder's abilities; `prompt` is a rendered prompt. Raises `BadInput` for no Jinja."""
    return abilities_of_template(read_chat_template(folder) or "", added_tokens(folder), prompt)


def abilities_of_template(template: str, tokens: Mapping[str, int], prompt: str = "") -> Abilities:
    """Return the abilities that a chat template shows; raises `BadInput` for one that is not Jinja."""
    marks = thought_marks(template)
    switch = thinking_switch(template)
    return Abilities(
        takes_tools=takes_tools(template),
        form=form_of(template),
        marks=marks,
        opened=bool(marks and marks.is_opened_by(prompt)),
        has_switch=bool(switch and switch.variable == RUNTIME_SWITCH),
        tokens=tokens,
    )
