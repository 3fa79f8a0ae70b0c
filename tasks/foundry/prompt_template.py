"""The description that Foundry's cache needs in a model's folder: its prompt template and generation defaults."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from slmops.infra.checkpoints.folder import read_chat_template, read_json
from slmops.infra.checkpoints.rendering import rendered_in_child
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.records import Record
from slmops.infra.reference.answers import Message

CONTENT = "{Content}"  # Foundry's placeholder for a message's text

Rendered = Callable[[Sequence[Message], bool], str | None]

# Texts that no chat template contains or changes; templates may trim a message's text.
_SYSTEM, _USER, _ASSISTANT, _NEXT_USER = (f"slmops-{role}-7f3c" for role in ("system", "user", "assistant", "next"))
_A_SYSTEM = {"role": "system", "content": _SYSTEM}
_A_USER = {"role": "user", "content": _USER}
_AN_ASSISTANT = {"role": "assistant", "content": _ASSISTANT}
_ANOTHER_USER = {"role": "user", "content": _NEXT_USER}
_TURNS = (_A_USER, _AN_ASSISTANT, _ANOTHER_USER)
# The conversations that are rendered, each with or without a generation prompt.
_PROBES: tuple[tuple[tuple[Message, ...], bool], ...] = (
    *(((_A_USER,), True), (_TURNS, True), (_TURNS, False), (_TURNS[:2], False)),
    *(((_A_SYSTEM, _A_USER), True), ((_A_SYSTEM, *_TURNS), True)),
)


class PromptTemplate(Record):
    """The static strings from which Foundry 0.8 builds a prompt, each with the placeholder `{Content}`.

    A prompt is the concatenation of one string per message; the last user message takes `prompt`, which ends where the
    answer begins. `system` is None when the template has no system role. No string contains the beginning-of-text
    token. `notes` say what the strings cannot express; without notes they agree with the chat template.
    """

    system: str | None
    user: str
    assistant: str
    prompt: str
    notes: tuple[str, ...] = ()

    def compose(self, messages: Sequence[Message]) -> str:
        """Return the prompt for a conversation that ends with a user message."""
        strings = {"system": self.system or "", "user": self.user, "assistant": self.assistant}
        turns = [strings[message["role"]].replace(CONTENT, message["content"]) for message in messages[:-1]]
        return "".join(turns) + self.prompt.replace(CONTENT, messages[-1]["content"])


class GenerationDefaults(Record):
    """ModelConfig of `inference_model.json`: Foundry 0.8's generation parameters unless a client sets others.

    `max_length` counts prompt and answer, in tokens. A temperature of 0 is greedy. The bounds of temperature are those
    of Foundry's runtime, that of top_p follows from its definition, and a repetition penalty above 2 gives no sensible
    text.
    """

    max_length: int = Field(ge=1)
    temperature: float = Field(ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=2)


def derive_prompt_template(chat_template: str, special_tokens: Mapping[str, str | None]) -> PromptTemplate:
    """Cut the static strings of a `PromptTemplate` out of a chat template, for any model family.

    The template renders conversations of known texts. The text between two messages is divided into the end of the
    first and the beginning of the second. The strings are then composed for four conversations and compared with the
    template's own rendering: every difference is a note.

    Raises `BadInput` when the template cannot render a single user message, or drops its text, or has no end.
    """
    render = _renderer(rendered_in_child(chat_template, special_tokens, _PROBES))
    bos, eos = special_tokens.get("bos_token") or "", special_tokens.get("eos_token") or ""
    notes: list[str] = []

    first = render([_A_USER], True)
    if first is None or first.count(_USER) != 1:
        raise BadInput(
            "The chat template does not render a conversation of one user message.",
            "Give a working one with --chat-template.",
            code="chat-template-does-not-render",
        )
    head, tail = first.split(_USER)
    user_prefix, user_suffix, assistant, generation = _turns(render, head.removeprefix(bos), tail, eos, notes)
    system = _system(render, bos, user_prefix, notes)
    default_head = head.removeprefix(bos).removesuffix(user_prefix)
    if head.removeprefix(bos) == default_head and user_prefix:
        notes.append("The first user message begins differently from later ones.")
    elif default_head:
        notes.append(
            f"Without a system message the template writes {_shown(default_head)} first, which the strings omit."
        )
    if "strftime_now" in chat_template:
        notes.append("The template writes the current date; the strings keep the date of the registration.")

    template = PromptTemplate(
        system=system,
        user=f"{user_prefix}{CONTENT}{user_suffix}",
        assistant=assistant,
        prompt=f"{user_prefix}{CONTENT}{user_suffix}{generation}",
    )
    plain, longer = [_A_USER], list(_TURNS)
    probes = [("a single message", plain), ("several turns", longer)]
    if system is not None:
        probes += [
            ("a system message", [_A_SYSTEM, *plain]),
            ("a system message and several turns", [_A_SYSTEM, *longer]),
        ]
    differing = [
        what
        for what, messages in probes
        if (render(messages, True) or "").removeprefix(bos) != template.compose(messages)
    ]
    if differing:
        notes.append(f"The strings differ from the template's own rendering for {', '.join(differing)}.")
    return template.model_copy(update={"notes": tuple(notes)})


def generation_defaults(
    generation_config: Mapping[str, object], overrides: Mapping[str, object], context_length: int
) -> GenerationDefaults:
    """Return ModelConfig from a checkpoint's generation_config.json and the user's overrides.

    Without sampling in generation_config.json (`do_sample`), the temperature is 0: the judged answers are greedy too.
    `max_length` is the context's length unless a smaller one is given.

    Raises `BadInput` naming an unknown key, or a value that is not a number, is out of bounds or exceeds the context.
    """
    values: dict[str, Any] = {
        key: generation_config[key]
        for key in GenerationDefaults.model_fields
        if generation_config.get(key) is not None and key != "temperature"
    }
    values["temperature"] = (generation_config.get("temperature") or 1.0) if generation_config.get("do_sample") else 0.0
    values["max_length"] = min(values.get("max_length", context_length), context_length)
    try:
        defaults = GenerationDefaults.model_validate({**values, **overrides})
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, found {fault['input']!r}" for fault in error.errors()
        )
        known = ", ".join(GenerationDefaults.model_fields)
        raise BadInput(f"The generation defaults are not valid: {faults}.", f"The keys are {known}.") from None
    if defaults.max_length > context_length:
        raise BadInput(
            f"max_length is {defaults.max_length}, but the model's context has {context_length} tokens.",
            "Give a smaller one.",
        )
    return defaults


def inference_model(
    model_id: str, version: int, description: str, prompt_template: PromptTemplate, defaults: GenerationDefaults
) -> dict[str, object]:
    """Return the content of `inference_model.json`."""
    return {
        "Name": model_id,
        "Description": description,
        "Version": version,
        "PromptTemplate": prompt_template.model_dump(exclude={"notes"}, exclude_none=True),
        "ModelConfig": defaults.model_dump(),
    }


def _renderer(rendered: Sequence[str | None]) -> Rendered:
    """Return a function that looks up the rendering of a probe; None is the answer where the template refuses it."""
    known = list(zip(_PROBES, rendered, strict=True))
    return lambda messages, generation: next(text for probe, text in known if probe == (tuple(messages), generation))


def _turns(render: Rendered, head: str, tail: str, eos: str, notes: list[str]) -> tuple[str, str, str, str]:
    """Return (user's prefix, user's suffix, the assistant's string, generation prompt).

    `head` and `tail` are the texts before and after a single user message, generation prompt included.
    """
    whole = render(_TURNS, True)
    open_end = render(_TURNS, False)
    answered = render(_TURNS[:2], False)
    gaps = None if whole is None else re.split(f"{_USER}|{_ASSISTANT}|{_NEXT_USER}", whole)
    if gaps is None or len(gaps) != 4 or open_end is None or answered is None or _ASSISTANT not in answered:
        notes.append("The template renders no conversation of several turns.")
        return head, "", CONTENT, tail
    user_suffix = _closing(open_end.rpartition(_NEXT_USER)[2], gaps[1], eos)
    assistant_suffix = _closing(answered.rpartition(_ASSISTANT)[2], gaps[2], eos)
    user_prefix = gaps[2].removeprefix(assistant_suffix)
    assistant = f"{gaps[1].removeprefix(user_suffix)}{CONTENT}{assistant_suffix}"
    return user_prefix, user_suffix, assistant, gaps[3].removeprefix(user_suffix)


def _system(render: Rendered, bos: str, user_prefix: str, notes: list[str]) -> str | None:
    text = render([_A_SYSTEM, _A_USER], True)
    if text is None or _SYSTEM not in text:
        notes.append("The template has no system role; a system message's text is not part of the prompt.")
        return None
    before, _, after = text.partition(_SYSTEM)
    gap, found, _ = after.partition(_USER)
    if not found:
        notes.append("The template writes the system message after the user's.")
        return None
    if not gap.endswith(user_prefix):
        notes.append("The template writes the system message inside the first user message; the strings put it before.")
        return f"{CONTENT}{gap}"
    return f"{before.removeprefix(bos)}{CONTENT}{gap.removesuffix(user_prefix)}"


def _closing(end: str, gap: str, eos: str) -> str:
    """Return the length of the part of `gap` that ends the message before it, from a conversation that ends there.

    Some templates add the end-of-text token if a conversation ends without a generation prompt.
    """
    for closing in (end, end.removesuffix(eos)):
        if gap.startswith(closing):
            return closing
    return ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def describe_model(folder: Path) -> tuple[PromptTemplate, GenerationDefaults]:
    """Return the prompt template and the generation defaults of a model folder's own files."""
    template = read_chat_template(folder)
    if template is None:
        raise StageFailed(f"The model in {folder} has no chat template.", "Pass one with --chat-template.")
    tokens = special_tokens(read_json(folder / "tokenizer_config.json"))
    config = read_json(folder / "genai_config.json")
    defaults = generation_defaults(config.get("search", {}), {}, int(config["model"]["context_length"]))
    return derive_prompt_template(template, tokens), defaults


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the texts of the special tokens that a chat template may name, from tokenizer_config.json."""
    tokens = {name: tokenizer_config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text if isinstance(text, str) else None for name, text in texts.items()}
