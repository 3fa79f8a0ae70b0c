"""The dataset of a fine-tuning: chats with answers, read from JSON Lines and checked, and its fingerprint."""

from collections.abc import Sequence
from pathlib import Path

from slmops.infra.checkpoints.s3 import fetch_file_from_s3
from slmops.infra.errors import BadInput
from slmops.infra.hf_datasets.dataset import read_hf_dataset
from slmops.infra.records import Record
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import digest_of
from slmops.tasks.questions.training_rows import TrainingRow, parse_rows, read_rows_file
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage

S3 = "s3://"


class Dataset(Record):
    """The data of a fine-tuning; equal rows in the same order have the same fingerprint."""

    origin: str
    rows: tuple[TrainingRow, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows' canonical JSON, in hexadecimal."""
        return digest_of([row.model_dump(mode="json") for row in self.rows])


@stage("read dataset", run_name="read-dataset")
def read_dataset_once(text: str, settings: Settings) -> Dataset:
    """See `read_dataset`."""
    with stage_progress("read dataset") as on_progress:
        on_progress(0, 1, f"reading {text}")
        return read_dataset(text, settings)


def read_dataset(text: str, settings: Settings) -> Dataset:
    """Read a local JSON Lines file, an `s3://` object, or a dataset of the `datasets` library (Hub id or folder).

    Raises `BadInput` for a dataset that is missing, has no rows or only one distinct row, or has lines that cannot be
    used; the message names the first few.
    """
    if text.startswith(S3):
        rows = read_rows_file(fetch_file_from_s3(text, settings, settings.cache_dir / "s3"), text)
    elif (path := Path(text).expanduser()).exists() and not path.is_dir():
        rows = read_rows_file(path, text)
    else:
        rows = parse_rows(text, "row", enumerate(read_hf_dataset(text, settings), 1))
    if len({row.model_dump_json() for row in rows}) < 2:
        raise BadInput(
            f"The dataset {text} has {len(rows)} rows and only one distinct example.",
            "A model would learn only that answer: give different examples.",
            code="dataset-one-example",
        )
    return Dataset(origin=text, rows=tuple(rows))


NumberedRow = tuple[int, TrainingRow]


def split(rows: Sequence[TrainingRow], held_out_share: float) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """Return the rows to train on, and the held-out rows, whose loss decides when training stops.

    Rows are held out at equal distances; of a few rows, the last one. Each row comes with its number in the dataset,
    starting with 1. A row that also occurs in the training rows is not held out, because its loss would mean nothing.
    """
    every = min(len(rows), round(1 / held_out_share))
    train = [(number, row) for number, row in enumerate(rows, 1) if number % every]
    held_out = [(number, row) for number, row in enumerate(rows, 1) if not number % every]
    known = {row.model_dump_json() for _, row in train}
    return train, [(number, row) for number, row in held_out if row.model_dump_json() not in known]
