"""Template parity: a conversation gives the same tokens in transformers, in genai and in Foundry Local."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from slmops.infra.errors import StageFailed
from slmops.infra.foundry.calls import CountedPrompts, CountPrompts
from slmops.infra.genai.calls import RenderChats, RenderedChat, RenderedChats
from slmops.infra.process.call import Call, R
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.records import Json, Record
from slmops.infra.reference.answers import Message
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.manifest import digest_of
from slmops.infra.storage.version import Variant
from slmops.infra.transformers.calls import RenderConversations, RenderedConversations
from slmops.tasks.exams.exam import Bench, Exam
from slmops.tasks.exams.parity_notes import (
    TOKENIZER_CONFIG,
    composition_notes,
    compositions_of,
    reference_notes,
    runtime_notes,
)
from slmops.tasks.exams.source import has_source
from slmops.tasks.questions.chats import CONTEXT, CONVERSATIONS, MARKS, NOTED_ONLY
from slmops.tasks.workshop import Workshop

# The files that determine a conversation's tokens, including a SentencePiece model.
DECIDING_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "genai_config.json", "config.json",
)  # fmt: skip
RUNTIMES = ("transformers", "tokenizers", "onnxruntime-genai", "foundry-local-sdk")

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
    token.
    """

    conversations: int
    mismatches: tuple[ParityMismatch, ...]
    broken_control_tokens: tuple[str, ...]
    notes: tuple[str, ...]

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
        return {"precision": variant.precision, "reference": self.reference, "versions": dict(_versions())}

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
        "versions": dict(_versions()),
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


def _versions() -> dict[str, str]:
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
    runtimes = _Runtimes(settings, bench, checkpoint_dir or bench.model, torch_child)
    expected = runtimes.transformers()
    refused = {name: found.refusal for name, found in expected.conversations.items() if found.refusal is not None}
    if len(refused) == len(CONVERSATIONS):
        raise StageFailed(
            f"transformers renders no conversation with the chat template of {runtimes.reference_dir}: "
            f"{refused['one user turn']}.",
            "Give a working one with --chat-template.",
            code="chat-template-does-not-render",
        )
    compared = {name: messages for name, messages in CONVERSATIONS.items() if name not in refused}
    compositions, notes = compositions_of(bench.model, compared)
    genai = runtimes.genai(compared, expected.control_tokens, compositions)
    foundry = runtimes.foundry(compared) if genai.fault is None else None
    mismatches = list(_mismatches(compared, expected, genai, foundry))
    if mismatches and expected.dated:
        # Midnight may have passed, or the template writes the time of day: render at the times of the other runtimes.
        moments = {name: _moments(name, genai, foundry) for name in compared}
        again = runtimes.transformers(moments).conversations
        rendered = {name: found for name, found in again.items() if found.renderings}
        expected = expected.model_copy(update={"conversations": expected.conversations | rendered})
        mismatches = list(_mismatches(compared, expected, genai, foundry))
    return TemplateParity(
        conversations=len(compared),
        mismatches=tuple(mismatch for mismatch in mismatches if mismatch.conversation not in NOTED_ONLY),
        broken_control_tokens=tuple(_broken_control_tokens(expected, genai)),
        notes=(
            *reference_notes(bench.model, checkpoint_dir, expected, refused),
            *runtime_notes([(mismatch.conversation, mismatch.runtime) for mismatch in mismatches]),
            *notes,
            *composition_notes(compositions, expected, genai),
        ),
    )


class _Runtimes:
    """The three child processes."""

    def __init__(self, settings: Settings, bench: Bench, reference_dir: Path, torch_child: ChildProcess | None) -> None:
        self.settings, self.reference_dir, self._torch_child = settings, reference_dir, torch_child
        self._bench, self._on_progress = replace(bench, on_progress=self._follow), bench.on_progress
        self._done = 0

    def transformers(self, moments: Mapping[str, Sequence[str]] | None = None) -> RenderedConversations:
        call = RenderConversations(
            tokenizer_dir=self.reference_dir,
            conversations=CONVERSATIONS,
            moments=moments or {},
            marks=MARKS,
            context=CONTEXT,
        )
        return self._run(call, within=self._torch_child)

    def genai(
        self, conversations: Mapping[str, Sequence[Message]], control_tokens: Iterable[str], texts: Mapping[str, str]
    ) -> RenderedChats:
        return self._run(
            RenderChats(
                model_dir=self._bench.model,
                conversations=conversations,
                control_tokens=tuple(control_tokens),
                context=CONTEXT,
                compositions=texts,
            )
        )

    def foundry(self, conversations: Mapping[str, Sequence[Message]]) -> CountedPrompts:
        model, cache = self._bench.model, self._bench.work / "foundry"
        call = CountPrompts(model_dir=model, cache_dir=cache, conversations=conversations)
        return self._run(call, deadline_s=self.settings.timeout.foundry_s)

    def _run(self, call: Call[R], *, deadline_s: float | None = None, within: ChildProcess | None = None) -> R:
        child = self._bench.run(call, deadline_s or self.settings.timeout.evaluate_s, within=within)
        self._done += 1
        return child.value

    def _follow(self, done: float, total: float, what: str) -> None:
        if self._on_progress:
            self._on_progress(min(self._done, 3), 3, what)


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
