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
