"""The runtimes whose prompts are compared, each in its own process."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slmops.infra.checkpoints.folder import read_chat_template, read_json
from slmops.infra.checkpoints.rendering import UNBOUNDED, rendered_in_child
from slmops.infra.errors import BadInput
from slmops.infra.foundry.calls import CountedPrompts, CountPrompts
from slmops.infra.genai.calls import RenderChats, RenderedChats
from slmops.infra.genai.served_files import mend_files
from slmops.infra.process.call import Call, R
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.records import Json
from slmops.infra.reference.answers import Message
from slmops.infra.settings import Settings
from slmops.infra.tool_calls.forms import with_tools_aside
from slmops.infra.transformers.calls import RenderConversations, RenderedConversations
from slmops.tasks.exams.exam import Bench
from slmops.tasks.foundry.prompt_template import special_tokens
from slmops.tasks.questions.chats import CONTEXT, MARKS

Conversations = Mapping[str, Sequence[Message]]
ToolConversations = Mapping[str, tuple[Sequence[Message], Sequence[Json]]]  # messages and tools


def require_an_end(folder: Path, conversations: Conversations) -> None:
    """Raise `BadInput` for a template that loops or grows with one of the conversations.

    It is tried first, because the runtimes render without bounds of memory. Other faults are found by them.
    """
    try:
        if template := read_chat_template(folder):
            tokens = special_tokens(read_json(folder / "tokenizer_config.json"))
            rendered_in_child(template, tokens, [(messages, True) for messages in conversations.values()])
    except BadInput as error:
        if error.code == UNBOUNDED:
            raise


@dataclass
class Runtimes:
    """Three child processes; genai and Foundry Local open the folder `bench.model`, transformers `reference`.

    With `before_build`, the model's files for chats are made from the reference's, as in a build, and Foundry Local is
    left out, because it needs the weights. `tools` are those of the conversations of these names.
    """

    settings: Settings
    bench: Bench
    reference: Path
    torch_child: ChildProcess | None
    before_build: bool = False
    tools: Mapping[str, Sequence[Json]] = field(default_factory=dict)
    done: int = 0

    def transformers(
        self, conversations: Conversations, moments: Mapping[str, Sequence[str]] | None = None
    ) -> RenderedConversations:
        """Render conversations with the reference's tokenizer, at the given moments if a template writes the date."""
        saves = self.before_build and moments is None
        call = RenderConversations(
            tokenizer_dir=self.reference,
            save_dir=self.bench.model if saves else None,
            conversations=conversations,
            tools=self.tools,
            moments=moments or {},
            marks=MARKS,
            context=CONTEXT,
        )
        rendered = self._run(call, within=self.torch_child)
        if saves:
            _finish(self.bench.model, self.reference)
        return rendered

    def genai(
        self, conversations: Conversations, control_tokens: Iterable[str], texts: Mapping[str, str]
    ) -> RenderedChats:
        """Render conversations with the model's folder, whose template takes tools beside the messages."""
        asked = {name: with_tools_aside(chat, self.tools.get(name, ())) for name, chat in conversations.items()}
        return self._run(
            RenderChats(
                model_dir=self.bench.model,
                conversations={name: chat for name, (chat, _) in asked.items()},
                tools={name: tools for name, (_, tools) in asked.items() if tools},
                control_tokens=tuple(control_tokens),
                context=CONTEXT,
                compositions=texts,
            )
        )

    def foundry(self, conversations: Conversations) -> CountedPrompts | None:
        """Count the tokens of conversations' prompts; None before there is a model."""
        if self.before_build:
            return None
        model, cache = self.bench.model, self.bench.work / "foundry"
        call = CountPrompts(model_dir=model, cache_dir=cache, conversations=conversations)
        return self._run(call, deadline_s=self.settings.timeout.foundry_s)

    def _run(self, call: Call[R], *, deadline_s: float | None = None, within: ChildProcess | None = None) -> R:
        bench = replace(self.bench, on_progress=self._follow)
        child = bench.run(call, deadline_s or self.settings.timeout.render_s, within=within)
        self.done += 1
        return child.value

    def _follow(self, done: float, total: float, what: str) -> None:
        if self.bench.on_progress:
            self.bench.on_progress(min(self.done, 3), 3, what)


def _finish(model: Path, checkpoint: Path) -> None:
    """Make a folder that genai opens as a tokenizer, with the files that the model builder adds to the weights."""
    config = read_json(checkpoint / "config.json")
    described = {
        "type": config.get("model_type", "llama"),
        "context_length": config.get("max_position_embeddings", 1),
        "vocab_size": config.get("vocab_size", 1),
        "eos_token_id": config.get("eos_token_id") or 0,
        "decoder": {"filename": "model.onnx"},
    }
    (model / "genai_config.json").write_text(json.dumps({"model": described, "search": {}}), "utf-8", newline="\n")
    mend_files(model, checkpoint)
