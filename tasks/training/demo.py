"""The demo checkpoint: smart-home commands in English, answered by JSON actions.

The data come from demo_intents.json: an intent is a JSON action with slots, and phrasings of requests for it.
Every (phrasing, slot values) pair is one command; a way of speaking (politeness, capitals, full stop) makes it a row.
"""

import hashlib
import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.call import OnProgress
from slmops.infra.process.slots import only_maker
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.settings import Settings
from slmops.infra.storage.leftovers import made_aside
from slmops.infra.transformers.calls import TrainChatModel
from slmops.tasks.checkpoint.inspection import EVALUATION_FILE, OUTPUT_SCHEMA_FILE
from slmops.tasks.training import tool_demo

Row = dict[str, Any]

TRAIN_ROWS = 9000
HELD_OUT_ROWS = 200
# The share of each intent's commands kept for evaluation. The same share of its actions (JSON answers) is not in the
# training rows.
HELD_OUT_SHARE = 0.08
# An intent with as many actions gets twice the rows: the model must copy a number, a time or two values.
MANY_ACTIONS = 20


@dataclass(frozen=True)
class Intent:
    """A possible request: the action's fixed and slotted (`{room}`) values, and its phrasings."""

    category: str
    action: Mapping[str, str]
    phrasings: tuple[str, ...]

    def slots(self) -> list[str]:
        """The names of the action's slots, in the action's order."""
        return [value[1:-1] for value in self.action.values() if value.startswith("{")]


_TABLES = json.loads((Path(__file__).parent / "demo_intents.json").read_text("utf-8"))
# The values of each slot, by its name.
SLOTS: Mapping[str, Sequence[str | int]] = _TABLES["slots"]
INTENTS = tuple(
    Intent(intent["category"], intent["action"], tuple(intent["phrasings"])) for intent in _TABLES["intents"]
)

# ChatML without a system prompt of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# 3.3 M parameters; every dimension is a multiple of 32, the block size of int4 and int8 weights.
TRAINING: Mapping[str, Any] = {
    "architecture": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "chat_template": CHAT_TEMPLATE,
    "vocabulary_size": 640,
    "epochs": 1,  # in one pass every row is new
    "learning_rate": 1e-3,
    "attention_learning_rate": 5e-3,
    "weight_decay": 0.1,
    # Prompts get a small weight, so that their next-token distributions are smooth and survive quantization.
    "prompt_loss_weight": 0.1,
    "batch_size": 16,
    "threads": 2,  # fixed, because the order of floating-point sums, and so the weights, depends on it
    "max_new_tokens": 48,
    "min_exact_match": 0.95,
}
LIBRARIES = ("safetensors", "tokenizers", "torch", "transformers")
RECORD = "demo_checkpoint.json"
_RESULTS = ("exact_match", "eval_rows", "parameters")  # of the training, kept in the record

# Ways of speaking and their weights. Most people speak to machines in few words.
OPENINGS = {"": 12, "please ": 3, "hey, ": 1, "ok, ": 1}
CLOSINGS = {"": 12, " please": 2, " now": 1, ", thanks": 1}
FULL_STOPS = {"": 3, ".": 1}


@dataclass(frozen=True)
class DemoCheckpoint:
    """A demo checkpoint on disk: a Hugging Face folder with `eval.jsonl` and `output_schema.json`.

    `exact_match` is the share of the held-out rows that it answers exactly; `training_s` is None if it came from the
    cache or was already there.
    """

    directory: Path
    seed: int
    exact_match: float
    eval_rows: int
    parameters: int
    training_s: float | None


@dataclass(frozen=True)
class _Recipe:
    """A demo's data and training; `evaluation` are the lines of its evaluation file, `schema` that of its answers.

    The training starts from the checkpoint of `base`, or from random weights.
    """

    seed: int
    train_rows: list[Row]
    held_out_rows: list[Row]
    training: Mapping[str, Any]
    evaluation: list[Row]
    schema: Mapping[str, object] | None = None
    base: "_Recipe | None" = None

    @cached_property
    def key(self) -> str:
        """Digest of everything that determines the checkpoint's bytes, given equal floating-point arithmetic."""
        versions = {name: version(name) for name in LIBRARIES}
        content = [self.seed, self.train_rows, self.held_out_rows, self.schema, dict(self.training), versions]
        content += [self.base.key] if self.base else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _json_recipe(seed: int) -> _Recipe:
    train_rows, held_out_rows = smart_home_dataset(seed)
    return _Recipe(seed, train_rows, held_out_rows, TRAINING, held_out_rows, output_schema())


def _tool_recipe(seed: int) -> _Recipe:
    base = _json_recipe(seed)
    chooser = random.Random(seed)  # noqa: S311 - data, no secrets
    train_rows, held_out_rows = tool_demo.tool_rows(base.train_rows, base.held_out_rows, chooser)
    training = {**TRAINING, **tool_demo.TRAINING}
    return _Recipe(seed, train_rows, held_out_rows, training, tool_demo.evaluation_lines(held_out_rows), base=base)


@dataclass(frozen=True)
class _Command:
    category: str
    text: str
    answer: str


def smart_home_dataset(seed: int) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows), the same for the same seed.

    A row is `{id, messages: [{role, content}], expected, category}` with `expected` a compact JSON object. No command
    (phrasing with its slot values) is in both lists, in any way of speaking. About half of the held-out rows also
    request an action that is in no training row.
    """
    chooser = random.Random(seed)  # noqa: S311 - data, no secrets
    train: list[list[_Command]] = []
    held_out: list[list[_Command]] = []
    for intent in INTENTS:
        seen, unseen = _split(list(_commands(intent)), chooser)
        actions = math.prod(len(SLOTS[slot]) for slot in intent.slots())
        train += [seen[0::2], seen[1::2]] if actions >= MANY_ACTIONS else [seen]
        held_out.append(unseen)
    return (
        _rows("train", _round_robin(train, TRAIN_ROWS, repeat=True), chooser),
        _rows("held-out", _round_robin(held_out, HELD_OUT_ROWS, repeat=False), chooser),
    )


def output_schema() -> dict[str, object]:
    """Return the JSON Schema of the answers: one kind of object per intent."""

    def value_of(value: str) -> dict[str, object]:
        if not value.startswith("{"):
            return {"const": value}
        return {"enum": [_machine_value(spoken) for spoken in SLOTS[value[1:-1]]]}

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Smart-home action",
        "anyOf": [
            {
                "type": "object",
                "properties": {key: value_of(value) for key, value in intent.action.items()},
                "required": list(intent.action),
                "additionalProperties": False,
            }
            for intent in INTENTS
        ],
    }


def _commands(intent: Intent) -> Iterator[_Command]:
    slots = intent.slots()
    for values in itertools.product(*(SLOTS[slot] for slot in slots)):
        spoken = dict(zip(slots, values, strict=True))
        action = {
            key: _machine_value(spoken[value[1:-1]]) if value.startswith("{") else value
            for key, value in intent.action.items()
        }
        answer = json.dumps(action, separators=(",", ":"))
        for phrasing in intent.phrasings:
            yield _Command(intent.category, phrasing.format(**spoken), answer)


def _machine_value(spoken: str | int) -> str | int:
    return spoken.replace(" ", "_") if isinstance(spoken, str) else spoken


def _split(commands: list[_Command], chooser: random.Random) -> tuple[list[_Command], list[_Command]]:
    chooser.shuffle(commands)
    answers = sorted({command.answer for command in commands})
    # An action with few values would lose a whole room or door that occurs nowhere else: hold out only its phrasings.
    few = len(answers) < 50
    unseen_answers = set() if few else set(chooser.sample(answers, round(len(answers) * HELD_OUT_SHARE / 2)))
    new_actions = [command for command in commands if command.answer in unseen_answers]
    others = [command for command in commands if command.answer not in unseen_answers]
    new_phrasings = others[: max(1, round(len(commands) * HELD_OUT_SHARE / 2))]
    alternating = [c for pair in itertools.zip_longest(new_actions, new_phrasings) for c in pair if c]
    return others[len(new_phrasings) :], alternating


def _round_robin(commands: list[list[_Command]], count: int, *, repeat: bool) -> list[_Command]:
    lists = [itertools.cycle(each) if repeat else iter(each) for each in commands]
    turns = itertools.cycle(lists)
    chosen: list[_Command] = []
    while len(chosen) < count:
        chosen.extend(itertools.islice(next(turns), 1))
    return chosen


def _rows(name: str, commands: list[_Command], chooser: random.Random) -> list[Row]:
    return [
        {
            "id": f"{name}-{number:05}",
            "messages": [{"role": "user", "content": _spoken(command.text, chooser)}],
            "expected": command.answer,
            "category": command.category,
        }
        for number, command in enumerate(commands, 1)
    ]


def _spoken(text: str, chooser: random.Random) -> str:
    opening, closing, full_stop = (
        chooser.choices(list(ways), list(ways.values()))[0] for ways in (OPENINGS, CLOSINGS, FULL_STOPS)
    )
    sentence = opening + text + closing + full_stop
    return sentence[0].upper() + sentence[1:] if chooser.random() < 0.5 else sentence


def make_demo_checkpoint(
    settings: Settings,
    directory: Path,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    *,
    tools: bool = False,
    replace: bool = False,
) -> DemoCheckpoint:
    """Train the demo checkpoint of `seed`, or take it from the cache, and copy it into `directory`.

    With `tools` it is the one that calls functions, which is trained from the other. The cache is keyed by data, recipe
    and library versions. `directory` is written atomically; if it already is this checkpoint, nothing is done. With
    `replace`, another demo checkpoint there (of another seed or recipe) is replaced.

    Raises `BadInput` if `directory` contains anything else; `StageFailed` if training misses its accuracy.
    """
    recipe = _tool_recipe(seed) if tools else _json_recipe(seed)
    directory = directory.expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if _is_whole(directory, recipe.key):
            return _described(directory, None)
        if not (replace and (directory / RECORD).is_file()):
            raise BadInput(
                f"{directory} exists and is not the demo checkpoint of seed {seed}.",
                "Give a new or an empty folder, or remove this one.",
                code="output-is-other-demo",
            )
    cached, training_s = _cached(recipe, settings, on_progress)
    with made_aside(directory) as aside:
        shutil.copytree(cached, aside)
        if not _is_whole(aside, recipe.key):
            raise StageFailed(f"The copy of the demo checkpoint in {aside.parent} differs from the trained one.")
        if directory.exists():
            shutil.rmtree(directory)  # empty, or the demo checkpoint that is replaced
        aside.rename(directory)
    return _described(directory, training_s)


def _cached(recipe: _Recipe, settings: Settings, on_progress: OnProgress | None) -> tuple[Path, float | None]:
    """Return the checkpoint in the cache, and how long its training took in seconds; None if it was there."""
    cached = settings.cache_dir / "demo" / recipe.key[:32]
    with only_maker(cached, on_progress):
        if _is_whole(cached, recipe.key):
            return cached, None
        shutil.rmtree(cached, ignore_errors=True)
        base = _cached(recipe.base, settings, on_progress)[0] if recipe.base else None
        return cached, _train(recipe, base, cached, settings, on_progress)


def _train(
    recipe: _Recipe, base: Path | None, target: Path, settings: Settings, on_progress: OnProgress | None
) -> float:
    """Train into `target`, which is written atomically, and return the duration in seconds."""
    with made_aside(target) as work_dir:
        work_dir.mkdir(parents=True)
        _write_rows(work_dir / "train.jsonl", recipe.train_rows)
        _write_rows(work_dir / EVALUATION_FILE, recipe.held_out_rows)
        result = run_in_child(
            TrainChatModel(
                **recipe.training,
                base_dir=base,
                seed=recipe.seed,
                train_file=work_dir / "train.jsonl",
                eval_file=work_dir / EVALUATION_FILE,
                output_dir=work_dir / "checkpoint",
            ),
            deadline_s=settings.timeout.train_s,
            log_path=target.with_suffix(".log"),
            work_dir=work_dir,
            on_progress=on_progress,
        ).value
        _write_rows(work_dir / "checkpoint" / EVALUATION_FILE, recipe.evaluation)
        if recipe.schema is not None:
            schema = json.dumps(recipe.schema, indent=2) + "\n"
            (work_dir / "checkpoint" / OUTPUT_SCHEMA_FILE).write_text(schema, "utf-8", newline="\n")
        _write_record(work_dir / "checkpoint", recipe, result.model_dump(include=set(_RESULTS)))
        (work_dir / "checkpoint").rename(target)
    return result.seconds


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8", newline="\n")


def _write_record(directory: Path, recipe: _Recipe, results: Mapping[str, object]) -> None:
    record = {"key": recipe.key, "seed": recipe.seed, **results, "files": _file_digests(directory)}
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8", newline="\n")


def _is_whole(directory: Path, key: str) -> bool:
    """Whether `directory` is exactly the demo checkpoint of `key`."""
    try:
        record = json.loads((directory / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(record["key"] == key and record["files"] == _file_digests(directory))


def _described(directory: Path, training_s: float | None) -> DemoCheckpoint:
    record = json.loads((directory / RECORD).read_text("utf-8"))
    return DemoCheckpoint(directory, record["seed"], **{name: record[name] for name in _RESULTS}, training_s=training_s)


def _file_digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != RECORD
    }
