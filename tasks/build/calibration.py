"""Calibration: the texts from which a recipe gets the inputs of the weights. They are never downloaded."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from prefect.utilities.annotations import opaque

from slmops.infra.errors import BadInput
from slmops.infra.files import write_whole
from slmops.infra.foreign_files import read_text
from slmops.infra.process.slots import only_maker
from slmops.infra.records import Record
from slmops.infra.reference.answers import Question
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.manifest import digest_of
from slmops.infra.transformers.calls import Calibrate, Chat
from slmops.tasks.build.recipes import Recipe
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.questions.messages import Message
from slmops.tasks.questions.training_rows import TrainingRow, Turn, read_rows_file
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop

PROMPTS_FILE = Path(__file__).parent / "calibration_prompts.jsonl"
PROMPTS_AT_ONCE = 32
MAX_TRAINING_CHATS = 512  # of a fine-tuning, for the calibration of its result; far fewer are used


class Calibration(Record):
    """The token ids of a build's calibration texts, of which the last `answers` are the checkpoint's own answers."""

    rows: tuple[tuple[int, ...], ...]
    answers: int

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids, in hexadecimal."""
        return digest_of([list(row) for row in self.rows])

    @property
    def summary(self) -> str:
        """The report's description of it."""
        chats = len(self.rows) - self.answers
        parts = [f"{chats} chats"] * (chats > 0) + [f"{self.answers} answers of its own"] * (self.answers > 0)
        return f"{sum(map(len, self.rows)):,} tokens of {' and '.join(parts)}"


def read_calibration_file(text: str, evaluation: Iterable[EvaluationRow]) -> list[TrainingRow]:
    """Read the calibration chats: JSON Lines, in the form of a training dataset.

    Raises `BadInput` for a file that is empty or cannot be used, and for a chat that is also an evaluation row: the
    variant would be judged on its calibration data.
    """
    rows = read_rows_file(Path(text).expanduser(), text)
    judged = {_asked(row.messages): row.id for row in evaluation}
    for number, row in enumerate(rows, 1):
        if (found := judged.get(_asked(row.messages[:-1]))) is not None:
            raise BadInput(
                f"Chat {number} of the calibration file {text} is the evaluation row {found!r}.",
                "Leave out the rows that variants are judged on.",
                code="calibration-row-judged",
            )
    return rows


def check_lengths(rows: Sequence[TrainingRow], folder: Path, context: int, max_tokens: int) -> None:
    """Raise `BadInput` for a chat that exceeds the context even without the chat template's text.

    Only the first chats, of `max_tokens` tokens together, are checked, because others are not used. For an adapter
    (context 0) and a checkpoint without a tokenizer.json, the check is made at calibration.
    """
    if not context or not (folder / "tokenizer.json").is_file():
        return
    from tokenizers import Tokenizer

    tokenizer, total = Tokenizer.from_str(read_text(folder / "tokenizer.json")), 0
    for number, row in enumerate(rows, 1):
        tokens = sum(len(tokenizer.encode(turn.content, add_special_tokens=False).ids) for turn in row.messages)
        if tokens > context:
            raise BadInput(
                f"Row {number} of the calibration file has over {tokens} tokens; the model's context is {context}.",
                "Shorten or remove the row.",
                code="calibration-row-too-long",
            )
        total += tokens
        if total >= max_tokens:
            return


def write_calibration_file(
    rows: Sequence[TrainingRow], evaluation: Iterable[EvaluationRow], settings: Settings
) -> str | None:
    """Write training chats to a calibration file, and return its path; None if all are evaluation rows.

    Of many chats, some at equal distances are taken.
    """
    judged = {_asked(row.messages) for row in evaluation}
    fitting = [row for row in rows if _asked(row.messages[:-1]) not in judged]
    taken = fitting[:: -(-len(fitting) // MAX_TRAINING_CHATS) or 1]
    if not taken:
        return None
    content = "".join(row.model_dump_json() + "\n" for row in taken)
    path = settings.cache_dir / "calibrations" / f"{digest_of([content])}.jsonl"
    write_whole(path, content)
    return str(path)


def _asked(messages: Sequence[Message]) -> str:
    return digest_of([[turn.role, turn.content] for turn in messages])


def built_in_prompts() -> list[tuple[Turn, ...]]:
    """Return the conversations that a checkpoint answers for calibration on its own answers."""
    lines = PROMPTS_FILE.read_text("utf-8").splitlines()
    return [tuple(Turn.model_validate(turn) for turn in json.loads(line)["messages"]) for line in lines]


@stage("calibrate", run_name="calibrate-{request.name}")
def calibrate_once(
    request: DeployRequest, prepared: PreparedCheckpoint, evaluation: Sequence[EvaluationRow]
) -> Calibration:
    """Make the calibration texts, or return those that were made from the same content before.

    They are the chats of the request's file and, if these are too few, the checkpoint's own answers to built-in
    prompts, but never an evaluation row. Raises `BadInput` as `read_calibration_file` and `Calibrate` do.
    """
    shop = workshop()
    settings = shop.settings
    file = request.calibration_file
    chats = read_calibration_file(file, evaluation) if file else []
    judged = {_asked(row.messages) for row in evaluation}
    prompts = [row for row in built_in_prompts() if _asked(row) not in judged]
    asked = {
        "checkpoint": prepared.digest,
        "chats": [row.model_dump(mode="json") for row in chats],
        "prompts": [[turn.model_dump() for turn in row] for row in prompts],
        "settings": settings.calibration.model_dump(),
    }
    record = settings.cache_dir / "calibrations" / f"{digest_of(asked)}.json"
    with stage_progress("calibrate") as on_progress, only_maker(record, on_progress):
        if record.is_file():
            on_progress(1, 1, "made before")
            return Calibration.model_validate_json(record.read_bytes())
        with work_folder(settings) as work:
            made = shop.torch.run(
                Calibrate(
                    checkpoint_dir=prepared.folder,
                    chats=tuple(
                        Chat(number=number, messages=tuple(turn.model_dump() for turn in row.messages))
                        for number, row in enumerate(chats, 1)
                    ),
                    prompts=tuple(
                        Question(id=number, messages=tuple(turn.model_dump() for turn in row))
                        for number, row in enumerate(prompts)
                    ),
                    max_tokens=settings.calibration.max_tokens,
                    max_new_tokens=settings.calibration.max_new_tokens,
                    batch_size=PROMPTS_AT_ONCE,
                    threads=settings.threads,
                ),
                deadline_s=settings.timeout.build_s,
                log_path=settings.cache_dir / "logs" / f"calibrate-{record.stem[:12]}.log",
                work_dir=work,
                on_progress=on_progress,
            ).value
        calibration = Calibration(rows=made.rows, answers=made.answers)
        write_whole(record, calibration.model_dump_json())
    return calibration


def calibration_for(
    recipes: Iterable[Recipe],
    request: DeployRequest,
    prepared: PreparedCheckpoint,
    evaluation: Sequence[EvaluationRow],
) -> Calibration | None:
    """Return the calibration texts; None if no recipe needs any."""
    if any(recipe.is_calibrated for recipe in recipes):
        return calibrate_once(request, prepared, evaluation)
    return None


def as_one(calibration: Calibration | None) -> Calibration | None:
    """Return the argument of a stage, in whose many tokens Prefect would otherwise look for results of other runs."""
    return cast("Calibration | None", opaque(calibration))
