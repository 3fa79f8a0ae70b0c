"""Template parity: a conversation gives the same tokens in transformers, in genai and in Foundry Local."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foundry.calls import CountedPrompts
from slmops.infra.genai.calls import RenderedChat, RenderedChats
from slmops.infra.genai.template_files import mend_template
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.records import Json, Record, later_field
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.manifest import digest_of
from slmops.infra.storage.version import Variant
from slmops.infra.transformers.calls import RenderedConversations
from slmops.tasks.exams.exam import Bench, Exam
from slmops.tasks.exams.parity_notes import (
    RUNTIME_NAMES,
    TOKENIZER_CONFIG,
    composition_notes,
    compositions_of,
    rare_character_notes,
    reference_notes,
    runtime_notes,
)
from slmops.tasks.exams.parity_runtimes import Conversations, Runtimes, ToolConversations, require_an_end
from slmops.tasks.exams.source import has_source
from slmops.tasks.questions.chats import CONVERSATIONS, NOTED_ONLY, plain_name, without_rare_characters
from slmops.tasks.questions.tool_chats import tool_chats
from slmops.tasks.workshop import Workshop

# The files that determine a conversation's tokens, including a SentencePiece model.
DECIDING_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "genai_config.json", "config.json",
)  # fmt: skip
RUNTIMES = ("transformers", "tokenizers", "onnxruntime-genai", "foundry-local-sdk")

# The prefix of the names of calibration chats among the conversations, and the share of them that may differ.
CALIBRATION = "calibration chat"
TOLERATED_SHARE = 0.01

Reference = Literal["checkpoint", "variant"]  # the tokenizer that the runtimes are compared with


class ParityMismatch(Record):
    """A conversation that a runtime renders or counts differently from transformers with the checkpoint's tokenizer.

    `expected` and `found` are prompts, with the token ids where the texts are the same. `found` is the error when the
    runtime cannot render the conversation, and `found_tokens` is 0 then. Foundry Local reports only the number of its
    prompt's tokens: `found` says so and shows genai's prompt.
    """

    conversation: str
    runtime: Literal["genai", "foundry"]
    expected: str
    found: str
    expected_tokens: int
    found_tokens: int


class TemplateParity(Record):
    """The comparison over a set of conversations; `notes` are differences that are no reason to reject.

    `broken_control_tokens` are tokens of the checkpoint's vocabulary that a runtime does not encode as that single
    token. `cause` is the first difference and why there is one, in a sentence; empty where there is none.
    """

    conversations: int
    mismatches: tuple[ParityMismatch, ...]
    broken_control_tokens: tuple[str, ...]
    notes: tuple[str, ...]
    cause: str = later_field("")

    @property
    def holds(self) -> bool:
        """Whether all runtimes agree."""
        return not self.mismatches and not self.broken_control_tokens


PARITY = Kind("parity", TemplateParity, field="parity")


class ParityExam(Exam[TemplateParity]):
    """Whether a variant's conversations give the same tokens in all runtimes.

    `checkpoint` is the folder of its source; without one the variant's own tokenizer is the reference. Variants with
    equal tokenizer files have the same key.
    """

    kind, name, done_before = PARITY, "parity", "compared before"

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint

    @property
    def reference(self) -> Reference:
        """The owner of the tokenizer that the runtimes are compared with."""
        return "checkpoint" if self.checkpoint else "variant"

    def question(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.question`."""
        return _question(variant, self.reference)

    def record(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.record`."""
        return {"precision": variant.precision, "reference": self.reference, "versions": dict(runtime_versions())}

    def known(self, variant: Variant, settings: Settings) -> TemplateParity | None:
        """Return the stored comparison; without a checkpoint, one with its tokenizer counts as well."""
        return known_parity(variant, with_checkpoint=self.checkpoint is not None)

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> TemplateParity:
        """See `Exam.take`."""
        return check_parity(shop.settings, bench, self.checkpoint, shop.torch_child)


def _question(variant: Variant, reference: Reference) -> Json:
    return {
        "files": {file.path: file.sha256 for file in variant.files if file.path in DECIDING_FILES},
        "source": variant.version.manifest.source.digest,
        "reference": reference,
        "conversations": {name: [dict(message) for message in messages] for name, messages in CONVERSATIONS.items()},
        "versions": dict(runtime_versions()),
    }


def known_parity(variant: Variant, *, with_checkpoint: bool) -> TemplateParity | None:
    """Return the stored comparison; with `with_checkpoint` False, one with the variant's own tokenizer counts too."""
    references: tuple[Reference, ...] = ("checkpoint", "variant")
    for reference in references[: 1 if with_checkpoint else 2]:
        if found := variant.version.latest(PARITY, digest_of(_question(variant, reference))[:16]):
            return found
    return None


def needs_parity(variants: Iterable[Variant]) -> bool:
    """Whether a variant's templates are not yet compared with those of its source checkpoint."""
    return any(has_source(variant) and known_parity(variant, with_checkpoint=True) is None for variant in variants)


def runtime_versions() -> dict[str, str]:
    """Return the versions of the packages that make prompts."""
    return {package: version(package) for package in RUNTIMES}


def check_parity(
    settings: Settings, bench: Bench, checkpoint_dir: Path | None, torch_child: ChildProcess | None = None
) -> TemplateParity:
    """Render `CONVERSATIONS` in the three runtimes, each in a process of its own, and compare the tokens.

    transformers runs within `torch_child`, if that is given.

    The reference is transformers with the tokenizer of `checkpoint_dir`, or with the genai folder's own where there is
    none. Conversations that the template refuses there are left out. A template or tokenizer that genai or Foundry
    Local cannot take is a mismatch.

    Raises `StageFailed` and its kinds: a tokenizer that transformers cannot load, a template that renders none of the
    conversations there, a model that Foundry Local cannot load.
    """
    runtimes = Runtimes(settings, bench, checkpoint_dir or bench.model, torch_child)
    return _compared(runtimes, CONVERSATIONS, checkpoint_dir)


def check_checkpoint(
    settings: Settings, bench: Bench, rows: Conversations, with_tools: ToolConversations
) -> TemplateParity:
    """Compare the prompts of a future build of `bench.model`, a checkpoint, with transformers.

    The conversations are those of `check_parity`, the user's `rows` and those `with_tools`, by name; without weights
    Foundry Local is left out. transformers has its own process without torch, because a process for builds could no
    longer import torch after that. Raises `StageFailed` as `check_parity` does, and `BadInput` for a row that the
    template refuses.
    """
    files = replace(bench, model=bench.work / "files")
    tools = {name: offered for name, (_, offered) in with_tools.items()}
    runtimes = Runtimes(settings, files, bench.model, None, before_build=True, tools=tools)
    chats = {name: messages for name, (messages, _) in with_tools.items()}
    return _compared(runtimes, {**CONVERSATIONS, **rows, **chats}, bench.model)


def _compared(runtimes: Runtimes, conversations: Conversations, checkpoint_dir: Path | None) -> TemplateParity:
    model_dir = runtimes.bench.model
    plain = {plain_name(name): twin for name, chat in CONVERSATIONS.items() if (twin := without_rare_characters(chat))}
    asked = {**conversations, **plain}
    require_an_end(runtimes.reference, asked)
    expected = runtimes.transformers(asked)
    refused = {name: found.refusal for name, found in expected.conversations.items() if found.refusal is not None}
    if len(refused) == len(asked):
        raise StageFailed(
            f"transformers renders no conversation with the chat template of {runtimes.reference}: "
            f"{refused['one user turn']}.",
            "Give a working one with --chat-template.",
            code="chat-template-does-not-render",
        )
    for name, reason in refused.items():
        if name not in CONVERSATIONS and name not in plain and name not in tool_chats():
            raise BadInput(
                f"The chat template cannot render {name}: {reason}.",
                "Change its messages or the chat template.",
                code="row-does-not-render",
            )
    compared = {name: messages for name, messages in asked.items() if name not in refused}
    compositions, notes = compositions_of(
        model_dir, {name: compared[name] for name in CONVERSATIONS if name in compared}
    )
    genai = runtimes.genai(compared, expected.control_tokens, compositions)
    foundry = runtimes.foundry(compared) if genai.fault is None else None
    mismatches = list(_mismatches(compared, expected, genai, foundry))
    if mismatches and expected.dated:
        # Midnight may have passed, or the template writes the time of day: render at the times of the other runtimes.
        moments = {name: _moments(name, genai, foundry) for name in compared}
        again = runtimes.transformers(asked, moments).conversations
        rendered = {name: found for name, found in again.items() if found.renderings}
        expected = expected.model_copy(update={"conversations": expected.conversations | rendered})
        mismatches = list(_mismatches(compared, expected, genai, foundry))
    blocking, rare = _by_harm(mismatches, plain)
    blocking = _beyond_tolerance(blocking, conversations)
    broken = tuple(_broken_control_tokens(expected, genai))
    return TemplateParity(
        conversations=len(set(compared) - set(plain)),
        mismatches=blocking,
        broken_control_tokens=broken,
        notes=(
            *reference_notes(model_dir, checkpoint_dir, expected, _without(refused, plain)),
            *runtime_notes([(found.conversation, found.runtime) for found in mismatches if found not in rare]),
            *rare_character_notes([(found.conversation, found.runtime) for found in rare], conversations),
            *notes,
            *composition_notes(compositions, expected, genai),
        ),
        cause=cause_of(blocking, broken, model_dir),
    )


def _beyond_tolerance(
    mismatches: tuple[ParityMismatch, ...], conversations: Conversations
) -> tuple[ParityMismatch, ...]:
    """Leave out differing calibration chats, unless they exceed the tolerated share."""
    chats = sum(name.startswith(CALIBRATION) for name in conversations)
    differing = {found.conversation for found in mismatches if found.conversation.startswith(CALIBRATION)}
    tolerated = differing if len(differing) <= TOLERATED_SHARE * chats else set()
    return tuple(found for found in mismatches if found.conversation not in tolerated)


def _without(refused: Mapping[str, str], plain: Conversations) -> dict[str, str]:
    return {name: reason for name, reason in refused.items() if name not in plain}


def _by_harm(
    mismatches: Sequence[ParityMismatch], plain: Conversations
) -> tuple[tuple[ParityMismatch, ...], tuple[ParityMismatch, ...]]:
    """Return the mismatches that reject, and those caused only by rare characters.

    The latter vanish with the characters: the same conversation without them has the same tokens in that runtime.
    Differences with every model and template are in neither list.
    """
    differing = {(mismatch.conversation, mismatch.runtime) for mismatch in mismatches}
    blocking: list[ParityMismatch] = []
    rare: list[ParityMismatch] = []
    for mismatch in mismatches:
        twin = plain_name(mismatch.conversation)
        if mismatch.conversation in NOTED_ONLY or mismatch.conversation in plain:
            continue
        (rare if twin in plain and (twin, mismatch.runtime) not in differing else blocking).append(mismatch)
    return tuple(blocking), tuple(rare)


def _mismatches(
    compared: Iterable[str],
    expected: RenderedConversations,
    genai: RenderedChats,
    foundry: CountedPrompts | None,
) -> Iterable[ParityMismatch]:
    """Yield the mismatches; a runtime agrees if it matches one of transformers' renderings."""
    for name in compared:
        renderings = expected.conversations[name].renderings
        first = renderings[0]
        if genai.fault is not None:
            found = RenderedChat(error=f"The tokenizer cannot be opened: {genai.fault}", moments=("", ""))
        else:
            found = genai.conversations[name]
        if found.ids not in [rendering.ids for rendering in renderings]:
            same = found.ids is not None and found.text == first.text
            yield ParityMismatch(
                conversation=name,
                runtime="genai",
                expected=_shown(first.text, first.ids, with_ids=same),
                found=found.error or _shown(found.text, found.ids, with_ids=same),
                expected_tokens=len(first.ids),
                found_tokens=len(found.ids or ()),
            )
        if foundry is None:
            continue
        counted = foundry.conversations[name]
        if counted.prompt_tokens not in [len(rendering.ids) for rendering in renderings]:
            found_text = counted.error or (
                "(Foundry Local tells only the number of tokens; onnxruntime-genai makes of this model:) "
                + (found.error or found.text)
            )
            yield ParityMismatch(
                conversation=name,
                runtime="foundry",
                expected=first.text,
                found=found_text,
                expected_tokens=len(first.ids),
                found_tokens=counted.prompt_tokens or 0,
            )


def _shown(text: str, ids: Sequence[int] | None, *, with_ids: bool) -> str:
    return f"{text}\n(tokens {list(ids or ())})" if with_ids else text


def _moments(name: str, genai: RenderedChats, foundry: CountedPrompts | None) -> list[str]:
    seen = [runtime.conversations[name].moments for runtime in (genai, foundry) if runtime and runtime.conversations]
    return [moment for moments in seen for moment in moments]


def _broken_control_tokens(expected: RenderedConversations, genai: RenderedChats) -> Iterable[str]:
    """Yield the control tokens that genai tokenizes differently from transformers, alone or inside a text."""
    for text, token in expected.control_tokens.items():
        found = genai.control_tokens.get(text)
        if found is None:
            continue  # the tokenizer cannot be opened, which is a mismatch of every conversation
        is_one = token.alone != (token.id,) or found.alone == (token.id,)
        if not is_one or found.in_context.count(token.id) != token.in_context.count(token.id):
            yield text


def cause_of(mismatches: Sequence[ParityMismatch], broken: Sequence[str], model_dir: Path) -> str:
    """Return the first difference and its cause, in a sentence; empty without a difference."""
    if not mismatches:
        return f"{broken[0]!r} is not one token in {RUNTIME_NAMES['genai']}." if broken else ""
    first = mismatches[0]
    runtime, others = RUNTIME_NAMES[first.runtime], len({found.conversation for found in mismatches}) - 1
    where = f"{first.conversation!r}{f' and {others} more' if others else ''}"
    if not first.found_tokens:
        fault = f"{runtime} cannot render {where}: {first.found}"
    elif broken:
        fault = f"{runtime} does not read {broken[0]!r} as one token, in {where}"
    else:
        fault = f"{runtime} gives other tokens for {where}: {_first_difference(first)}"
    template = read_chat_template(model_dir)
    left = mend_template(template).left if template else ()
    return f"{fault.rstrip('.')}{f' (in its Jinja, {left[0]})' if left else ''}."


def _first_difference(mismatch: ParityMismatch) -> str:
    pairs = zip(mismatch.expected, mismatch.found, strict=False)
    start = max(0, next((at for at, (one, other) in enumerate(pairs) if one != other), 0) - 20)
    expected, found = (text[start : start + 60] for text in (mismatch.expected, mismatch.found))
    return f"{found!r} where transformers has {expected!r}"
