"""Evaluation: what a variant is asked, how it compares with its source checkpoint, and whether it may be served."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from prefect import task
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, StrictStr, ValidationError, model_validator

from infra.errors import BadInput
from infra.process.supervisor import OnProgress, run_in_child
from infra.settings import GateSettings, Settings
from infra.storage.folders import place, work_folder
from infra.storage.registry import Manifest, ModelRegistry, StoredVariant
from infra.storage.registry import digest_of as digest_of_json
from tasks.checkpoint import EVALUATION_FILE, PreparedCheckpoint
from tasks.progress import stage_progress
from tasks.retries import PASSING_FAULTS

CHAT_PROMPTS_FILE = Path(__file__).parent / "evaluation" / "chat_prompts.jsonl"
MAX_LINE_BYTES = 1_000_000


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Result(BaseModel):
    """A child's result: keys that are not evidence (token ids, rendered prompts) are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


RowId = StrictInt | Annotated[StrictStr, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Message(_Record):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: StrictStr


class EvaluationRow(_Record):
    """A chat to answer and, where there is one, the answer that is expected.

    A system message may come first; then user and assistant alternate, and the user has the last word.
    """

    id: RowId
    messages: tuple[Message, ...] = Field(min_length=1)
    expected: StrictStr | None = None
    scorer: Literal["exact_match"] = "exact_match"
    category: StrictStr | None = None

    @model_validator(mode="after")
    def _turns_alternate(self) -> "EvaluationRow":
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        usual = ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
        if turns != usual or not turns or turns[-1] != "user":
            raise ValueError(
                "messages must alternate between user and assistant (after an optional system message) "
                f"and end with a user's turn, found {', '.join(roles)}"
            )
        return self


def read_evaluation_file(path: Path) -> list[EvaluationRow]:
    """Read an evaluation file: JSON Lines in UTF-8, one row `{id, messages, expected, scorer?, category?}` a line.

    Blank lines are skipped. Raises `BadInput` naming the first line that cannot be used and why.
    """
    rows = _read_rows(path)
    for number, row in rows:
        if row.expected is None:
            raise _bad_line(path, number, "`expected` is missing")
    return [row for _, row in rows]


def chat_prompts() -> list[EvaluationRow]:
    """The built-in chats for a model that comes without an evaluation file; they have no expected answers."""
    return [row for _, row in _read_rows(CHAT_PROMPTS_FILE)]


def read_rows(evaluation_file: str | None, folder: Path | None) -> list[EvaluationRow]:
    """Return the named file's rows, else those of the checkpoint folder's `eval.jsonl`, else the built-in chats."""
    if evaluation_file:
        return read_evaluation_file(Path(evaluation_file).expanduser())
    if folder is not None and (folder / EVALUATION_FILE).is_file():
        return read_evaluation_file(folder / EVALUATION_FILE)
    return chat_prompts()


def digest_of(rows: Sequence[EvaluationRow]) -> str:
    """SHA-256 of the rows' canonical JSON, in hexadecimal: same rows in the same order, same digest."""
    return digest_of_json([row.model_dump(mode="json") for row in rows])


def _read_rows(path: Path) -> list[tuple[int, EvaluationRow]]:
    rows: list[tuple[int, EvaluationRow]] = []
    first_line_of: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in _lines(path, file):
                row = _parse_row(path, number, line)
                first = first_line_of.setdefault(str(row.id), number)
                if first != number:
                    raise _bad_line(path, number, f"the id {row.id!r} was already used in line {first}")
                rows.append((number, row))
    except OSError as error:
        raise BadInput(
            f"The evaluation file {path} cannot be read: {error.strerror or error}.", "Name a readable file."
        ) from error
    if not rows:
        raise BadInput(f"The evaluation file {path} has no rows.", "Write at least one JSON object on a line.")
    return rows


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _bad_line(path, number, f"it is longer than {MAX_LINE_BYTES:,} bytes")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise _bad_line(path, number, f"it is not UTF-8 at byte {error.start + 1}") from None
        if text:
            yield number, text


def _parse_row(path: Path, number: int, line: str) -> EvaluationRow:
    try:
        content = json.loads(line)
    except RecursionError:
        raise _bad_line(path, number, "its JSON is nested too deep") from None
    except json.JSONDecodeError as error:
        raise _bad_line(path, number, f"it is not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _bad_line(path, number, f"it cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise _bad_line(path, number, f"it must be an object, found {type(content).__name__}")
    try:
        row = EvaluationRow.model_validate(content)
        row.model_dump_json().encode()
    except ValidationError as error:
        raise _bad_line(path, number, "; ".join(_fault(fault) for fault in error.errors()[:3])) from None
    except (UnicodeError, ValueError):  # JSON can spell half a surrogate pair, which is no text
        raise _bad_line(path, number, "it holds an unpaired surrogate, which is not text") from None
    return row


def _fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"] if part not in {"int", "str", "constrained-str"})
    if fault["type"] == "missing":
        return f"`{where}` is missing"
    if fault["type"] == "extra_forbidden":
        return f"unknown key `{where}`"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    found = repr(fault["input"])
    return f"`{where}`: {fault['msg']}, found {found if len(found) <= 60 else found[:57] + '...'}"


def _bad_line(path: Path, number: int, fault: str) -> BadInput:
    return BadInput(f"Line {number} of the evaluation file {path} cannot be used: {fault}.", "Correct that line.")


class ReferenceRow(_Result):
    """The source checkpoint's answer to one row."""

    id: RowId
    answer: str
    exact_match: bool | None


class Reference(_Result):
    """What variants are held to: the source checkpoint's greedy answers and the digest of its logits."""

    rows: tuple[ReferenceRow, ...]
    exact_match: Share | None
    positions: int
    vocabulary_size: int
    logits_sha256: str
    answers_sha256: str
    rows_sha256: str
    dtype: str
    versions: dict[str, str]
    wall_s: FiniteFloat
    peak_rss_bytes: int


class EvaluatedRow(_Result):
    """A variant's answer to one row and how its distributions compare there (None: no reference, or not finite)."""

    id: RowId
    answer: str
    exact_match: bool | None
    identical_to_reference: bool | None
    prompt_tokens: int
    template_matches: bool | None
    positions: int
    finite_positions: int
    top1_agreement: Share | None
    kl_divergence: FiniteFloat | None


class TemplateMismatch(_Result):
    """A prompt that the serving runtime renders or tokenizes otherwise than transformers does."""

    id: RowId
    reference: str
    variant: str
    reference_ids: tuple[int, ...]
    variant_ids: tuple[int, ...]


class TemplateMismatches(_Result):
    """How many rows' prompts differ, and the first of them."""

    count: int
    example: TemplateMismatch | None


class Vocabulary(_Result):
    """Lengths of the logits, and of the part that was compared."""

    variant: int
    reference: int | None
    compared: int


class Evaluation(_Result):
    """A variant's answers and its distance from the reference; see `infra.genai.runtime.evaluate` for each figure."""

    rows: tuple[EvaluatedRow, ...]
    template_mismatches: TemplateMismatches
    positions: int
    finite_logits: Share
    top1_agreement: Share | None
    kl_divergence: FiniteFloat | None
    kl_divergence_p99: FiniteFloat | None
    perplexity: FiniteFloat | None
    reference_perplexity: FiniteFloat | None
    exact_match: Share | None
    reference_exact_match: Share | None
    identical_answers: Share | None
    empty_answers: int
    worst_rows: tuple[RowId, ...]
    vocabulary: Vocabulary
    rows_sha256: str
    threads: int
    versions: dict[str, str]
    wall_s: FiniteFloat
    peak_rss_bytes: int

    @property
    def has_reference(self) -> bool:
        """Whether the variant was compared with a source checkpoint."""
        return self.vocabulary.reference is not None


def run_reference(
    settings: Settings,
    checkpoint_dir: Path,
    rows: Sequence[EvaluationRow],
    work_dir: Path,
    on_progress: OnProgress | None = None,
) -> Reference:
    """Run the source checkpoint on the rows in a child process; `work_dir` keeps what `evaluate_variant` compares with.

    Raises `BadInput` for a row that the model cannot take, `StageFailed` and its kinds as `run_in_child` does.
    """
    used = rows[: settings.evaluation.max_rows]
    request = {
        "checkpoint_dir": str(checkpoint_dir.absolute()),
        "rows": _asked(used),
        "max_new_tokens": settings.evaluation.max_new_tokens,
        "max_positions": settings.evaluation.max_positions,
        "batch_size": settings.evaluation.batch_size,
        "threads": settings.threads,
        "dtype": "float32",
        "output_dir": str(work_dir.absolute()),
    }
    child = run_in_child(
        "infra.transformers.reference:reference",
        request,
        deadline_s=settings.timeout.reference_s,
        log_path=work_dir / "reference.log",
        work_dir=work_dir,
        on_progress=on_progress,
    )
    return Reference(
        **child.value, rows_sha256=digest_of(used), wall_s=child.wall_s, peak_rss_bytes=child.peak_rss_bytes
    )


def evaluate_variant(
    settings: Settings,
    model_dir: Path,
    rows: Sequence[EvaluationRow],
    *,
    reference_dir: Path | None,
    work_dir: Path,
    on_progress: OnProgress | None = None,
    execution_provider: str | None = None,
) -> Evaluation:
    """Run a genai model folder on the rows in a child process.

    `reference_dir` is the `work_dir` that `run_reference` was given for the same rows, or None for a model without a
    source checkpoint. `execution_provider` None runs on what the folder's own configuration says.

    Raises `StageFailed` and its kinds: a model that cannot be opened or run, a vocabulary of another model.
    """
    used = rows[: settings.evaluation.max_rows]
    request = {
        "model_dir": str(model_dir.absolute()),
        "rows": _asked(used),
        "reference_dir": None if reference_dir is None else str(reference_dir.absolute()),
        "max_new_tokens": settings.evaluation.max_new_tokens,
        "max_positions": settings.evaluation.max_positions,
        "threads": settings.threads,
        "execution_provider": execution_provider,
    }
    child = run_in_child(
        "infra.genai.runtime:evaluate",
        request,
        deadline_s=settings.timeout.evaluate_s,
        log_path=work_dir / "evaluate.log",
        work_dir=work_dir,
        on_progress=on_progress,
    )
    return Evaluation(
        **child.value, rows_sha256=digest_of(used), wall_s=child.wall_s, peak_rss_bytes=child.peak_rss_bytes
    )


def _asked(rows: Sequence[EvaluationRow]) -> list[dict[str, Any]]:
    return [row.model_dump(mode="json", include={"id", "messages", "expected"}) for row in rows]


class GateThresholds(_Record):
    """What a variant must reach: shares, and nats per token."""

    min_top1_agreement: Share
    max_kl_divergence: Annotated[FiniteFloat, Field(ge=0)]
    max_quality_loss: Share


def _thresholds(top1: float, kl: float, loss: float) -> GateThresholds:
    return GateThresholds(min_top1_agreement=top1, max_kl_divergence=kl, max_quality_loss=loss)


# DESIGN.md, section 8. fp32 is held to what fp16 is.
DEFAULT_THRESHOLDS = {
    "fp32": _thresholds(0.99, 0.005, 0.02),
    "fp16": _thresholds(0.99, 0.005, 0.02),
    "int8": _thresholds(0.97, 0.02, 0.02),
    "int4": _thresholds(0.90, 0.10, 0.05),
}


def thresholds_for(
    precision: str,
    settings: GateSettings,
    *,
    min_top1_agreement: float | None = None,
    max_kl_divergence: float | None = None,
    max_quality_loss: float | None = None,
) -> GateThresholds:
    """The precision's thresholds; a setting overrides the default of every precision, a parameter overrides both.

    Raises `BadInput` for an unknown precision or a threshold out of its bounds.
    """
    if precision not in DEFAULT_THRESHOLDS:
        known = ", ".join(DEFAULT_THRESHOLDS)
        raise BadInput(f"There are no gate thresholds for the precision {precision!r}.", f"Use one of {known}.")
    parameters = {
        "min_top1_agreement": min_top1_agreement,
        "max_kl_divergence": max_kl_divergence,
        "max_quality_loss": max_quality_loss,
    }
    values = DEFAULT_THRESHOLDS[precision].model_dump()
    for name, parameter in parameters.items():
        setting: float | None = getattr(settings, name)
        values[name] = next(value for value in (parameter, setting, values[name]) if value is not None)
    try:
        return GateThresholds(**values)
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}" for fault in error.errors())
        raise BadInput(f"Gate thresholds are not valid: {faults}.", "Correct them.") from None


class GateCheck(_Record):
    """One comparison with a threshold; `value` is None when there is no finite figure, and then it did not pass."""

    name: Literal["top1_agreement", "kl_divergence", "quality_loss", "finite_logits", "non_empty_answers"]
    value: FiniteFloat | None
    threshold: FiniteFloat
    passed: bool


class GateVerdict(_Record):
    """The gate's decision: passed when every check passed. `notes` say what could not be judged, or what stands out."""

    passed: bool
    checks: tuple[GateCheck, ...]
    notes: tuple[str, ...] = ()


def judge(evaluation: Evaluation, thresholds: GateThresholds) -> GateVerdict:
    """Decide whether a variant may be registered.

    With a reference: `top1_agreement` (at least), `kl_divergence` (at most), `quality_loss` (at most: the reference's
    share of exact matches minus the variant's; only with expected answers) and `finite_logits` (all). Without one:
    `finite_logits` and `non_empty_answers` (all), and a note that says so.
    """
    checks = []
    notes = []
    if evaluation.has_reference:
        checks.append(_at_least("top1_agreement", evaluation.top1_agreement, thresholds.min_top1_agreement))
        checks.append(_at_most("kl_divergence", evaluation.kl_divergence, thresholds.max_kl_divergence))
        if evaluation.exact_match is not None and evaluation.reference_exact_match is not None:
            loss = evaluation.reference_exact_match - evaluation.exact_match
            checks.append(_at_most("quality_loss", loss, thresholds.max_quality_loss))
        else:
            notes.append("The evaluation rows have no expected answers: only the distributions were judged.")
    else:
        answered = 1 - evaluation.empty_answers / len(evaluation.rows)
        checks.append(_at_least("non_empty_answers", answered, 1.0))
        notes.append(
            "There is no source checkpoint to compare with: "
            "only finite logits and answers that are not empty were checked."
        )
    checks.append(_at_least("finite_logits", evaluation.finite_logits, 1.0))
    mismatches = evaluation.template_mismatches.count
    if mismatches:
        share = f"{mismatches} of {len(evaluation.rows)} prompts"
        notes.append(f"The runtime renders or tokenizes {share} otherwise than transformers.")
    return GateVerdict(passed=all(check.passed for check in checks), checks=tuple(checks), notes=tuple(notes))


def _at_least(name: Any, value: float | None, threshold: float) -> GateCheck:
    value = _finite(value)
    return GateCheck(name=name, value=value, threshold=threshold, passed=value is not None and value >= threshold)


def _at_most(name: Any, value: float | None, threshold: float) -> GateCheck:
    value = _finite(value)
    return GateCheck(name=name, value=value, threshold=threshold, passed=value is not None and value <= threshold)


def _finite(value: float | None) -> float | None:
    """The value without the last bits' noise (1.0 - 0.98 is a little more than 0.02); None when it is not finite."""
    return round(value, 12) if value is not None and math.isfinite(value) else None


class EvaluationSet(_Record):
    """The rows of one deploy and where they are from."""

    rows: tuple[EvaluationRow, ...]
    origin: str

    @property
    def summary(self) -> str:
        """What the report says the variants were judged on."""
        return f"{len(self.rows)} rows of {self.origin}"


@task(name="read evaluation", task_run_name="read-evaluation", tags=["slmops"])
def read_evaluation(evaluation_file: str | None, folder: Path | None, settings: Settings) -> EvaluationSet:
    """Read the rows that the variants are judged on, the first `evaluation.max_rows` of them."""
    rows = read_rows(evaluation_file, folder)[: settings.evaluation.max_rows]
    built_in = rows[0].expected is None
    return EvaluationSet(
        rows=tuple(rows), origin="slmops' own chats" if built_in else evaluation_file or EVALUATION_FILE
    )


def evaluation_key(variant: StoredVariant, source_digest: str, evaluation: EvaluationSet, settings: Settings) -> str:
    """Return the key of a variant's evaluation: the same question has the same key."""
    question = {
        "variant": variant.digest,
        "source": source_digest,
        "rows": digest_of(evaluation.rows),
        "settings": settings.evaluation.model_dump(mode="json"),
    }
    return digest_of_json(question)[:16]


def known_evaluation(
    manifest: Manifest, variant: StoredVariant, evaluation: EvaluationSet, registry: ModelRegistry, settings: Settings
) -> Evaluation | None:
    """Return a variant's evaluation on these rows if it is on record."""
    key = evaluation_key(variant, manifest.source.digest, evaluation, settings)
    known = registry.latest_evidence(manifest, "evaluation", key)
    return Evaluation.model_validate(known["evaluation"]) if known else None


def reference_folder(source_digest: str, evaluation: EvaluationSet, settings: Settings) -> Path:
    """Return where the reference's answers and logits wait for the variants."""
    question = {
        "source": source_digest,
        "rows": digest_of(evaluation.rows),
        "settings": settings.evaluation.model_dump(mode="json"),
    }
    return settings.cache_dir / "references" / digest_of_json(question)


def forget_reference(source_digest: str, evaluation: EvaluationSet, settings: Settings) -> None:
    """Remove the reference's logits once every variant was compared with them: they are large."""
    shutil.rmtree(reference_folder(source_digest, evaluation, settings), ignore_errors=True)


def last_evaluation_set(manifest: Manifest, registry: ModelRegistry) -> EvaluationSet | None:
    """Return the rows of a version's last evaluation, or None when it was never evaluated."""
    record = registry.latest_evidence(manifest, "evaluation")
    return EvaluationSet(rows=record["rows"], origin=record["origin"]) if record else None


def needs_reference(manifest: Manifest, evaluation: EvaluationSet, registry: ModelRegistry, settings: Settings) -> bool:
    """Whether some variant has yet to be compared with its source checkpoint on these rows."""
    if manifest.source.parameters == 0:
        return False
    known = (known_evaluation(manifest, one, evaluation, registry, settings) for one in manifest.variants)
    return any(one is None for one in known)


@task(name="run reference", task_run_name="reference", tags=["slmops", "evaluate"], **PASSING_FAULTS)
def run_reference_once(prepared: PreparedCheckpoint, evaluation: EvaluationSet, settings: Settings) -> None:
    """Run the source checkpoint in transformers on the rows, unless its answers wait already."""
    folder = reference_folder(prepared.digest, evaluation, settings)
    with stage_progress("reference") as on_progress:
        if folder.is_dir():
            return
        with work_folder(settings) as work:
            run_reference(settings, prepared.folder, evaluation.rows, work / "reference", on_progress)
            place(work / "reference", folder)


@task(
    name="evaluate variant", task_run_name="evaluate-{variant.precision}", tags=["slmops", "evaluate"], **PASSING_FAULTS
)
def evaluate_stored_variant(
    manifest: Manifest,
    variant: StoredVariant,
    evaluation: EvaluationSet,
    registry: ModelRegistry,
    settings: Settings,
    *,
    has_reference: bool,
) -> Evaluation:
    """Evaluate a variant of the store and keep the figures as evidence; an evaluation on record is reused."""
    with stage_progress(f"evaluate {variant.precision}") as on_progress:
        known = known_evaluation(manifest, variant, evaluation, registry, settings)
        if known:
            on_progress(1, 1, "evaluated before")
            return known
        reference = reference_folder(manifest.source.digest, evaluation, settings) if has_reference else None
        with work_folder(settings) as work:
            registry.materialize(variant.files, work / "model")
            evaluated = evaluate_variant(
                settings,
                work / "model",
                evaluation.rows,
                reference_dir=reference,
                work_dir=work,
                on_progress=on_progress,
            )
        record = {
            "precision": variant.precision,
            "rows": [row.model_dump(mode="json") for row in evaluation.rows],
            "origin": evaluation.origin,
            "evaluation": evaluated.model_dump(mode="json"),
        }
        key = evaluation_key(variant, manifest.source.digest, evaluation, settings)
        registry.add_evidence(manifest, "evaluation", record, key)
    return evaluated


@task(name="judge variant", task_run_name="judge-{variant.precision}", tags=["slmops", "evaluate"])
def judge_stored_variant(
    manifest: Manifest,
    variant: StoredVariant,
    evaluated: Evaluation,
    thresholds: GateThresholds,
    registry: ModelRegistry,
) -> GateVerdict:
    """Judge a variant and append the verdict to the version's evidence."""
    verdict = judge(evaluated, thresholds)
    record = {"precision": variant.precision, "thresholds": thresholds.model_dump(), **verdict.model_dump(mode="json")}
    registry.add_evidence(manifest, "verdict", record)
    return verdict
