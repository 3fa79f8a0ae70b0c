"""The source's answers at the prompt lengths at which a variant gives no text: a common gap is no fault."""

from collections.abc import Iterable
from pathlib import Path

from slmops.infra.errors import StageFailed
from slmops.infra.records import Json, Record
from slmops.infra.reference.decoding import PLAIN, Decoding
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.version import Variant
from slmops.infra.transformers.calls import AnswerAtLengths
from slmops.tasks.exams.exam import Bench, Exam
from slmops.tasks.exams.measurement import Measurement, MeasurementExam
from slmops.tasks.exams.source import has_source
from slmops.tasks.workshop import Workshop


class SourceLengths(Record):
    """Prompt lengths in tokens, and whether the source checkpoint's answer at each is a text."""

    prompt_tokens: tuple[int, ...]
    answered: tuple[bool, ...]

    @property
    def silent(self) -> frozenset[int]:
        """The lengths at which the source gives no text."""
        pairs = zip(self.prompt_tokens, self.answered, strict=True)
        return frozenset(length for length, answered in pairs if not answered)


SOURCE_LENGTHS = Kind("source-lengths", SourceLengths, field="lengths")


class SourceLengthsExam(Exam[SourceLengths]):
    """Asks the source checkpoint, in `checkpoint`, at the lengths at which a variant's sweep found no text."""

    kind, name, done_before = SOURCE_LENGTHS, "source lengths", "asked before"

    def __init__(self, measured: Measurement, checkpoint: Path | None, decoding: Decoding | None) -> None:
        silent = [row for row in measured.sweep if row.answered is False]
        self.prompt_tokens = tuple(sorted({row.prompt_tokens for row in silent}))
        self.new_tokens = max((row.new_tokens for row in silent), default=0)
        self.checkpoint, self.decoding = checkpoint, decoding or PLAIN

    def question(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.question`."""
        return {
            "source": variant.version.manifest.source.digest,
            "prompt_tokens": [*self.prompt_tokens],
            "new_tokens": self.new_tokens,
            "decoding": self.decoding.model_dump(mode="json"),
        }

    def can_be_asked(self, variant: Variant, settings: Settings) -> bool:
        """Whether there are such lengths, and a source or a stored answer."""
        asked = bool(self.prompt_tokens) and has_source(variant)
        return asked and (self.checkpoint is not None or self.known(variant, settings) is not None)

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> SourceLengths:
        """See `Exam.take`."""
        if self.checkpoint is None:
            raise StageFailed("The source checkpoint is not available.", "Deploy it again.")
        call = AnswerAtLengths(
            checkpoint_dir=self.checkpoint,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            threads=shop.settings.threads,
            decoding=self.decoding,
        )
        child = bench.run(call, shop.settings.timeout.reference_s, within=shop.torch_child)
        return SourceLengths(prompt_tokens=self.prompt_tokens, answered=child.value)


def needs_source_at_lengths(variants: Iterable[Variant], decoding: Decoding | None, settings: Settings) -> bool:
    """Whether a stored sweep found no text at lengths at which the source was not tested yet."""
    for variant in variants:
        measured = MeasurementExam().known(variant, settings) if has_source(variant) else None
        exam = SourceLengthsExam(measured, None, decoding) if measured else None
        if exam and exam.prompt_tokens and exam.known(variant, settings) is None:
            return True
    return False
