"""Perplexity and distance from the reference on a text file that the user names."""

import codecs
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, FiniteFloat

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import open_regular
from slmops.infra.genai.calls import ComparedText, CompareText, ScoredWindow
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.records import Json, Record, later_field
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.version import Variant
from slmops.infra.transformers.calls import ScoreTextAsSource
from slmops.tasks.exams.estimates import Estimate, weighted_mean
from slmops.tasks.exams.exam import Bench
from slmops.tasks.exams.source import ComparedExam, has_source
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import Workshop, workshop

# Each window is scored without the text before it: long enough to have context, short enough for every model.
WINDOW_TOKENS = 256
# Far more bytes than the tokens of any language need, so that the token limit applies; the rest is not read.
BYTES_PER_TOKEN = 32
MAX_TEXT_BYTES = 64 * 2**20
LARGEST_EXPONENT = 700  # exp of more is beyond a float64


class TextSample(Record):
    """The beginning of a text file: as much as can hold the tokens that are used; `digest` is its SHA-256."""

    origin: str
    text: str = Field(repr=False)
    digest: str


class TextComparison(Record):
    """A variant compared with its reference on the beginning of a text; divergences in nats per token.

    The perplexities are over every token, the comparison of distributions is over `positions` of them. Figures are
    None where the variant's logits were not finite or there is no reference. Intervals are bootstrapped over the
    windows of `window_tokens` tokens that the text is cut into; `perplexity_ratio` is the variant's over the
    reference's, and above 1 where the variant is worse.
    """

    origin: str
    tokens: int
    positions: int
    finite_logits: FiniteFloat
    perplexity: FiniteFloat | None
    reference_perplexity: FiniteFloat | None
    perplexity_ratio: Estimate | None
    top1_agreement: Estimate | None
    kl_divergence: Estimate | None
    kl_divergence_p99: FiniteFloat | None
    window_tokens: int = WINDOW_TOKENS
    near_agreement: Estimate | None = later_field(None)
    notes: tuple[str, ...] = ()


def read_text_file(path: Path, max_tokens: int) -> TextSample:
    """Read as much of a UTF-8 text file as `max_tokens` tokens can need, and no more.

    Raises `BadInput` for a file that is missing, no regular file, empty, binary or not UTF-8.
    """
    limit = min(max_tokens * BYTES_PER_TOKEN, MAX_TEXT_BYTES)
    try:
        with open_regular(path) as file:
            content = file.read(limit)
            whole = not file.read(1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"The text file {path} cannot be read: {reason}.", "Name a readable file.", code="text-file-unreadable"
        ) from error
    if b"\0" in content:
        raise BadInput(
            f"{path} is not text: it has a null byte at byte {content.index(0) + 1}.",
            "Name a file of plain text in UTF-8.",
            code="text-file-not-text",
        )
    try:
        # A cut may split a character: only then may bytes be left over.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=whole)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8 at byte {error.start + 1}.",
            "Save it as UTF-8 (iconv -t UTF-8 does that).",
            code="text-file-not-utf8",
        ) from None
    if not text.strip():
        raise BadInput(f"The text file {path} is empty.", "Name a file with some text.", code="text-file-empty")
    return TextSample(origin=path.name, text=text, digest=hashlib.sha256(text.encode()).hexdigest())


def run_text_reference(
    settings: Settings, bench: Bench, text: TextSample, torch_child: ChildProcess | None = None
) -> None:
    """Score the text with the source checkpoint, the bench's model; `bench.work` keeps what `compare_on_text` needs.

    It is run within `torch_child`, if that is given.

    Raises `BadInput` for a text of fewer than two tokens, `StageFailed` and its kinds as `run_in_child` does.
    """
    bench.run(
        ScoreTextAsSource(
            checkpoint_dir=bench.model,
            text_file=_write(text, bench.work),
            max_tokens=settings.evaluation.max_text_tokens,
            window_tokens=WINDOW_TOKENS,
            max_positions=settings.evaluation.max_positions,
            threads=settings.threads,
            output_dir=bench.work,
        ),
        settings.timeout.reference_s,
        within=torch_child,
    )


def compare_on_text(
    settings: Settings, bench: Bench, text: TextSample, *, reference_dir: Path | None
) -> TextComparison:
    """Score the text with a genai model folder, the bench's, in a child process and compare it with the reference.

    `reference_dir` is the work folder of `run_text_reference` for the same text, or None for a model without a source
    checkpoint: then only the perplexity is known.

    Raises `BadInput` for a text of fewer than two tokens, `StageFailed` and its kinds for a model that cannot be run.
    """
    child = bench.run(
        CompareText(
            model_dir=bench.model,
            text_file=_write(text, bench.work),
            reference_dir=reference_dir,
            max_tokens=settings.evaluation.max_text_tokens,
            window_tokens=WINDOW_TOKENS,
            threads=settings.threads,
        ),
        settings.timeout.evaluate_s,
    )
    return summarize(child.value, text.origin)


def _write(text: TextSample, work_dir: Path) -> Path:
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "text.txt"
    path.write_bytes(text.text.encode())
    return path


def summarize(compared: ComparedText, origin: str) -> TextComparison:
    """Make the record from the child's raw figures.

    The ratio of perplexities is exp of the mean difference of the log-probabilities per token, and so is its
    interval; like the other intervals it is bootstrapped over windows, weighted by their tokens.
    """
    windows = compared.windows
    scored = sum(window.tokens for window in windows)
    compared_windows = [window for window in windows if window.positions]
    positions = [window.positions for window in compared_windows]
    notes = []
    if compared.last_position_only:
        notes.append("The model gives one position's logits at a time, so that the text was read token by token.")
    return TextComparison(
        origin=origin,
        tokens=compared.tokens,
        positions=sum(positions),
        finite_logits=sum(window.finite_tokens for window in windows) / scored,
        perplexity=_perplexity([window.log_probability for window in windows], scored),
        reference_perplexity=_perplexity([window.reference_log_probability for window in windows], scored),
        perplexity_ratio=_perplexity_ratio(windows),
        top1_agreement=_weighted([window.agreeing for window in compared_windows], positions),
        kl_divergence=_weighted([window.kl_divergence for window in compared_windows], positions),
        kl_divergence_p99=compared.kl_divergence_p99,
        window_tokens=compared.window_tokens,
        near_agreement=_weighted([window.nearly_agreeing for window in compared_windows], positions),
        notes=tuple(notes),
    )


def _perplexity(log_probabilities: Sequence[float | None], tokens: int) -> float | None:
    """exp of the mean negative log-likelihood; None when one is unknown or beyond what a float64 holds."""
    known = [value for value in log_probabilities if value is not None]
    if len(known) < len(log_probabilities):
        return None
    mean = -math.fsum(known) / tokens
    return math.exp(mean) if mean < LARGEST_EXPONENT else None


def _perplexity_ratio(windows: Sequence[ScoredWindow]) -> Estimate | None:
    differences = [
        window.reference_log_probability - window.log_probability
        for window in windows
        if window.reference_log_probability is not None and window.log_probability is not None
    ]
    if len(differences) < len(windows):
        return None
    found = _weighted(differences, [window.tokens for window in windows])
    if found is None or found.high >= LARGEST_EXPONENT:
        return None
    return Estimate(value=math.exp(found.value), low=math.exp(found.low), high=math.exp(found.high))


def _weighted(sums: Sequence[float | None], sizes: Sequence[int]) -> Estimate | None:
    """Mean per token, given each window's sum and size; None when a window's sum is unknown or there is no window."""
    means = [total / size for total, size in zip(sums, sizes, strict=True) if total is not None]
    return weighted_mean(means, sizes) if means and len(means) == len(sums) else None


TEXT = Kind("text", TextComparison, field="comparison")


class TextExam(ComparedExam[TextComparison]):
    """How well a variant predicts a text, compared with its source checkpoint."""

    kind, name, done_before = TEXT, "text", "compared before"
    source_name = "reference on text"

    def __init__(self, text: TextSample) -> None:
        self.text = text

    def question(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.question`."""
        return {"variant": variant.digest, **self.source_question(variant.version.manifest.source.digest, settings)}

    def record(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.record`."""
        return {"precision": variant.precision, "text": self.text.digest}

    def source_question(self, source_digest: str, settings: Settings) -> Json:
        """See `ComparedExam.source_question`."""
        return {
            "source": source_digest,
            "text": self.text.digest,
            "max_tokens": settings.evaluation.max_text_tokens,
            "max_positions": settings.evaluation.max_positions,
            "window_tokens": WINDOW_TOKENS,
        }

    def run_source(self, bench: Bench, shop: Workshop) -> None:
        """See `ComparedExam.run_source`."""
        run_text_reference(shop.settings, bench, self.text, shop.torch_child)

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> TextComparison:
        """See `Exam.take`."""
        source = variant.version.manifest.source.digest
        return compare_on_text(
            shop.settings,
            bench,
            self.text,
            reference_dir=self.source_folder(source, shop.settings) if has_source(variant) else None,
        )


@stage("read text", run_name="read-text")
def read_text(path: str) -> TextSample:
    """Read the beginning of the text file that the variants' perplexity is taken on."""
    return read_text_file(Path(path).expanduser(), workshop().settings.evaluation.max_text_tokens)
