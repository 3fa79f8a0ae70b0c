"""Notes on a comparison of chat templates: differences that are no reason to reject a variant."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from slmops.infra.checkpoints.folder import read_chat_template, read_json
from slmops.infra.checkpoints.tokenizer import saved_by
from slmops.infra.errors import BadInput, SlmopsError
from slmops.infra.genai.calls import RenderedChats
from slmops.infra.reference.answers import Message
from slmops.infra.transformers.calls import RebuiltTokenizer, RenderedConversations
from slmops.tasks.foundry.prompt_template import describe_model
from slmops.tasks.questions.chats import NOTED_ONLY, rare_characters

TOKENIZER_CONFIG = "tokenizer_config.json"
RUNTIME_NAMES = {"genai": "onnxruntime-genai", "foundry": "Foundry Local"}


def reference_notes(
    model_dir: Path, checkpoint_dir: Path | None, expected: RenderedConversations, refused: Mapping[str, str]
) -> Iterable[str]:
    """Yield notes on the reference and its chat template; `refused` has the reasons by conversation."""
    if checkpoint_dir is None:
        yield "There is no source checkpoint: the reference is the variant's own tokenizer in transformers."
    for reason in dict.fromkeys(refused.values()):
        names = ", ".join(name for name, found in refused.items() if found == reason)
        yield f"Not compared, as the chat template refuses them ({reason}): {names}."
    if expected.dated:
        yield (
            "The chat template writes the date, so the same conversation has another prompt every day. "
            "All runtimes take it from the machine's clock."
        )
    if expected.rebuilt and expected.rebuilt.conversations:
        yield _rebuilt(expected.rebuilt, checkpoint_dir or model_dir)
    plain = [mark for mark, tokens in expected.marks.items() if tokens > 1]
    if plain:
        yield (
            f"{', '.join(plain)} look{'s' if len(plain) == 1 else ''} like control tokens, "
            "but the checkpoint's tokenizer has them as plain text."
        )
    differing = _differing_templates(model_dir)
    if differing:
        yield differing


def _rebuilt(rebuilt: RebuiltTokenizer, folder: Path) -> str:
    release = saved_by(folder)
    by = (
        f"transformers {release} saved the checkpoint" if release else "the checkpoint names no release of transformers"
    )
    source = "tokenizer.json" if rebuilt.follows_file else "that class"
    return (
        f"The class {rebuilt.class_name} in transformers 5 splits texts differently from tokenizer.json "
        f"({' and '.join(rebuilt.parts)}; {len(rebuilt.conversations)} conversations differ). "
        f"The tokens of {source} are used, because {by}."
    )


def runtime_notes(mismatches: Sequence[tuple[str, str]]) -> Iterable[str]:
    """Yield notes on differences that do not depend on the template, by conversations and runtimes that differ."""
    noted = [(conversation, runtime) for conversation, runtime in mismatches if conversation in NOTED_ONLY]
    if len(noted) < len(mismatches):
        return  # these differences have another cause
    for name in dict.fromkeys(conversation for conversation, _ in noted):
        runtimes = " and ".join(RUNTIME_NAMES[runtime] for conversation, runtime in noted if conversation == name)
        yield f"{name[0].upper()}{name[1:]} are other tokens in {runtimes} than in transformers: {NOTED_ONLY[name]}."


def rare_character_notes(
    mismatches: Sequence[tuple[str, str]], conversations: Mapping[str, Sequence[Message]]
) -> Iterable[str]:
    """Note differences that vanish with a conversation's rare characters, with an example."""
    if not mismatches:
        return
    name, _ = mismatches[0]
    runtimes = " and ".join(dict.fromkeys(RUNTIME_NAMES[runtime] for _, runtime in mismatches))
    others = len({conversation for conversation, _ in mismatches}) - 1
    shown = " ".join(rare_characters(conversations[name])[:8])
    yield (
        f"{runtimes} split rare characters into other tokens than transformers, as in {name!r} (one of {shown})"
        f"{f' and {others} more' if others else ''}. Without these characters the tokens are the same."
    )


def _differing_templates(model_dir: Path) -> str | None:
    """Note that a folder has two chat templates: transformers prefers chat_template.jinja, genai tokenizer_config."""
    path = model_dir / "chat_template.jinja"
    try:
        configured = read_json(model_dir / TOKENIZER_CONFIG).get("chat_template")
        used = read_chat_template(model_dir)
    except BadInput as error:
        return error.message
    if not path.is_file() or not isinstance(configured, str) or configured == used:
        return None
    return (
        f"{TOKENIZER_CONFIG} and {path.name} have different templates: onnxruntime-genai and Foundry Local use the "
        "former, transformers the latter."
    )


def compositions_of(
    model_dir: Path, conversations: Mapping[str, Sequence[Message]]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the prompts composed from inference_model.json's strings, or the reason why there are none."""
    try:
        template, _ = describe_model(model_dir)
    except SlmopsError as error:
        return {}, (f"There are no strings for inference_model.json: {error.message}",)
    judged = {name: messages for name, messages in conversations.items() if name not in NOTED_ONLY}
    has_system = template.system is not None
    expressible = {name: messages for name, messages in judged.items() if has_system or messages[0]["role"] != "system"}
    left_out = ", ".join(name for name in judged if name not in expressible)
    notes = (f"inference_model.json's PromptTemplate has no system message: {left_out}.",) if left_out else ()
    return {name: template.compose(messages) for name, messages in expressible.items()}, notes


def composition_notes(
    compositions: Mapping[str, str], expected: RenderedConversations, genai: RenderedChats
) -> Iterable[str]:
    """Note where inference_model.json's strings give other prompts or tokens than the chat template.

    Foundry 0.8 concatenates these strings and leaves the begin token to the tokenizer.
    """
    begin = expected.begin_token or ""
    other_text: list[str] = []
    other_tokens: dict[str, list[str]] = {}
    for name, text in compositions.items():
        renderings = expected.conversations[name].renderings
        if text not in [rendering.text.removeprefix(begin) for rendering in renderings]:
            other_text.append(name)
        elif genai.fault is None:
            found, ids = genai.compositions[name], [rendering.ids for rendering in renderings]
            if found not in ids:
                why = ""
                if found in [sequence[1:] for sequence in ids]:
                    why = f": the strings have no {begin}, and the tokenizer adds none by itself"
                elif found[1:] in ids:
                    why = ": the tokenizer adds a begin token that the template does not write"
                other_tokens.setdefault(why, []).append(name)
    if other_text:
        yield (
            "inference_model.json's PromptTemplate gives other prompts than the chat template: "
            f"{_listed(other_text, compositions)}."
        )
    for why, names in other_tokens.items():
        yield (
            f"inference_model.json's PromptTemplate gives the chat template's text, but other tokens{why} "
            f"({_listed(names, compositions)})."
        )


def _listed(names: Sequence[str], among: Iterable[str]) -> str:
    others = [name for name in among if name not in names]
    if len(others) < len(names):
        return f"all but {', '.join(others)}" if others else "all conversations"
    return ", ".join(names)
