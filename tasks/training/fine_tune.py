"""Stage "fine-tune": a base and a dataset become an adapter or a checkpoint; the same question is trained once."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from slmops.infra.checkpoints.source import SourceKind, parse_checkpoint
from slmops.infra.errors import BadInput
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.records import Record
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import made_once
from slmops.infra.storage.manifest import digest_of
from slmops.infra.storage.names import check_new_name
from slmops.infra.transformers.calls import Chat, FineTune, FineTuned
from slmops.tasks.checkpoint.inspection import content_digest, inspect_checkpoint
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint, fetch_checkpoint
from slmops.tasks.questions.evaluation_set import read_evaluation_set
from slmops.tasks.questions.training_rows import TrainingRow
from slmops.tasks.request.parameters import PRECISIONS
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.training.dataset import Dataset, read_dataset, split

Method = Literal["lora", "full"]
HELD_OUT_SHARE = 0.1
RESULT = "checkpoint"
RECORD_FILE = "fine_tuning.json"


class Hyperparameters(Record):
    """The hyperparameters of a fine-tuning; `early_stopping_patience` in epochs, `max_length` in tokens."""

    method: Method = "lora"
    epochs: int = Field(3, ge=1, le=1000)
    learning_rate: float = Field(2e-4, gt=0, le=1, allow_inf_nan=False)
    batch_size: int = Field(8, ge=1, le=4096)
    lora_rank: int = Field(16, ge=1, le=1024)
    early_stopping_patience: int = Field(2, ge=1, le=1000)
    max_length: int | None = Field(None, ge=8, le=10_000_000)
    seed: int = Field(0, ge=0, le=2**32 - 1)

    @classmethod
    def checked(cls, **values: object) -> "Hyperparameters":
        """Return the hyperparameters; raises `BadInput` naming each value that cannot be used."""
        try:
            return cls(**values)
        except ValidationError as error:
            faults = "; ".join(
                f"{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}" for fault in error.errors()
            )
            raise BadInput(f"The hyperparameters are not valid: {faults}.", "Correct these values.") from None


class FineTuning(FineTuned):
    """The result of a fine-tuning and its question, which `key` identifies: dataset, base and hyperparameters."""

    key: str
    dataset: str
    dataset_fingerprint: str
    rows: int
    base: str
    base_digest: str
    hyperparameters: Hyperparameters
    peak_rss_bytes: int


@stage("prepare base", run_name="prepare-base")
def prepare_base(base: str, revision: str | None, settings: Settings) -> PreparedCheckpoint:
    """Fetch a base and check it; raises `BadInput` for one that is missing or not a whole checkpoint."""
    with stage_progress("prepare base") as on_progress:
        folder = fetch_checkpoint(base, revision, settings, on_progress)
        inspection = inspect_checkpoint(folder)
        if inspection.kind != "checkpoint":
            raise BadInput(f"The base {base} is not a whole checkpoint.", "Name a model that save_pretrained wrote.")
        uri = folder.absolute().as_uri()
        return PreparedCheckpoint(uri=uri, origin=base, digest=content_digest(folder), inspection=inspection)


def key_of(dataset: Dataset, base: PreparedCheckpoint, hyperparameters: Hyperparameters) -> str:
    """Return the key of a fine-tuning's question, in hexadecimal, without values that cannot change the result."""
    asked = hyperparameters.model_dump(mode="json")
    if hyperparameters.method == "full":
        asked.pop("lora_rank")
    return digest_of({"dataset": dataset.fingerprint, "base": base.digest, "hyperparameters": asked})


@stage("fine-tune", run_name="fine-tune-{base.origin}")
def fine_tune_once(
    dataset: Dataset, base: PreparedCheckpoint, hyperparameters: Hyperparameters, settings: Settings
) -> tuple[str, FineTuning]:
    """Fine-tune a base, and return the folder of the result with its record; an earlier result is reused.

    An interrupted run continues from its last epoch. Raises `BadInput` and `StageFailed` as the child does.
    """
    key = key_of(dataset, base, hyperparameters)
    target = settings.cache_dir / "fine-tunings" / key
    state_dir = settings.cache_dir / "fine-tuning-states" / key
    with stage_progress("fine-tune") as on_progress, made_once(target, settings, on_progress) as made:
        if made is None:
            on_progress(1, 1, "trained before")
        else:
            train, held_out = split(dataset.rows, HELD_OUT_SHARE)
            child = run_in_child(
                FineTune(
                    base_dir=base.folder,
                    train=_numbered(train),
                    held_out=_numbered(held_out),
                    **hyperparameters.model_dump(exclude={"early_stopping_patience"}),
                    patience=hyperparameters.early_stopping_patience,
                    threads=settings.threads,
                    state_dir=state_dir,
                    output_dir=made / RESULT,
                ),
                deadline_s=settings.timeout.fine_tune_s,
                log_path=settings.cache_dir / "logs" / f"fine-tune-{key[:12]}.log",
                work_dir=made.parent,
                on_progress=on_progress,
            )
            record = FineTuning(
                key=key,
                dataset=dataset.origin,
                dataset_fingerprint=dataset.fingerprint,
                rows=len(dataset.rows),
                base=base.origin,
                base_digest=base.digest,
                hyperparameters=hyperparameters,
                peak_rss_bytes=child.peak_rss_bytes,
                **dict(child.value),
            )
            (made / RECORD_FILE).write_text(record.model_dump_json(indent=2), "utf-8", newline="\n")
    shutil.rmtree(state_dir, ignore_errors=True)
    return str(target / RESULT), FineTuning.model_validate_json((target / RECORD_FILE).read_bytes())


def _numbered(chats: Sequence[tuple[int, TrainingRow]]) -> list[Chat]:
    return [Chat(number=number, messages=[turn.model_dump() for turn in row.messages]) for number, row in chats]


def check_retrain(parameters: Mapping[str, Any], settings: Settings) -> None:
    """Raise `BadInput` for a request that a retrain would refuse, as far as this is known without a network."""
    check_new_name(parameters["name"])
    hyperparameters = {name: parameters[name] for name in Hyperparameters.model_fields if name in parameters}
    Hyperparameters.checked(**hyperparameters)
    for precision in parameters.get("precisions") or ():
        if precision not in PRECISIONS:
            raise BadInput(f"The precision {precision!r} is unknown.", f"Use one of {', '.join(PRECISIONS)}.")
    base = parse_checkpoint(parameters["base"], parameters.get("revision"))
    if base.kind is SourceKind.LOCAL:
        inspect_checkpoint(Path(base.location))
    if Path(parameters["dataset"]).expanduser().is_file():
        read_dataset(parameters["dataset"], settings)
    rows_file = parameters.get("evaluation_file")
    if rows_file and Path(rows_file).expanduser().is_file():
        read_evaluation_set(rows_file, None)


@contextmanager
def only_retrain_of(name: str, settings: Settings) -> Iterator[None]:
    """Prevent a second retrain of a name on this machine; raises `BadInput` while one runs."""
    lock = FileLock(settings.cache_dir / "retrains" / f"{name}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)  # the operating system releases it when this process ends
    except Timeout:
        raise BadInput(f"A retrain of {name} is running on this machine.", "Wait for it, or cancel it first.") from None
    try:
        yield
    finally:
        lock.release()
