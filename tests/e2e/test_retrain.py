"""`slmops retrain` on the demo's checkpoint: a new room is promoted, and wrong labels are rejected."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SMALL, Slmops, SlmopsHere

pytestmark = pytest.mark.slow

NEW_ROOMS = ("attic", "sauna", "workshop", "terrace")
PHRASES = {
    "on": (
        "turn on the {} lights",
        "switch on the {} lamp",
        "turn the {} light on",
        "illuminate the {}",
        "light up the {}",
    ),
    "off": (
        "turn off the {} lights",
        "switch off the {} lamp",
        "turn the {} light off",
        "darken the {}",
        "black out the {}",
    ),
}
MANNERS = ("{}", "please {}", "{} please", "hey, {}", "{} now", "could you {}", "{} for me")
ENOUGH_TO_COMPARE = {"SLMOPS_EVALUATION__MAX_ROWS": "60", "SLMOPS_EVALUATION__MAX_NEW_TOKENS": "48"}
LEARNING = ("--method", "full", "--learning-rate", "1e-3", "--epochs", "4", "--batch-size", "8", "--precision", "int4")


def commands() -> list[dict[str, Any]]:
    """Rows in rooms that are unknown to the demo, in a random order."""
    rows = [
        {
            "messages": [{"role": "user", "content": manner.format(phrase.format(room))}],
            "expected": json.dumps({"device": "light", "room": room, "action": action}, separators=(",", ":")),
        }
        for room, (action, phrases), manner in itertools.product(NEW_ROOMS, PHRASES.items(), MANNERS)
        for phrase in phrases
    ]
    random.Random(1).shuffle(rows)
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_better_candidate_is_promoted_the_same_is_skipped_and_a_poisoned_one_kept_out(
    demo: tuple[Slmops, dict[str, Any]], tmp_path: Path
) -> None:
    home = demo[0].home
    slmops = SlmopsHere(home, {**demo[0].environment, **SMALL, **ENOUGH_TO_COMPARE})
    base = home / "demo"
    known = [json.loads(line) for line in (base / "eval.jsonl").read_text("utf-8").splitlines()]
    new = commands()
    dataset = [*new[40:100], *known[:30]]  # with what it knows, so that it does not forget it
    rows = [{"id": f"new-{index}", **row} for index, row in enumerate(new[:40])]
    evaluation = write(tmp_path / "eval.jsonl", [*rows, *known[100:120]])
    # A model of its own, so that the other tests find the demo's as it was.
    slmops.run("deploy", base, "--name", "house", "--precision", "int4", "--eval", evaluation)
    asked = ("--base", base, "--name", "house", "--eval", evaluation, *LEARNING)

    better = slmops.json("retrain", write(tmp_path / "chats.jsonl", dataset), *asked)
    assert better["status"] == "promoted", better["summary"]
    assert better["challenge"]["gain"]["low"] > 0.2
    assert better["fine_tuning"]["losses"]
    assert slmops.json("show", "house@champion")["version"] == better["version"] == 2

    again = slmops.json("retrain", tmp_path / "chats.jsonl", *asked)
    assert (again["status"], again["version"]) == ("skipped", 2)

    answers = [row["expected"] for row in dataset]
    random.Random(2).shuffle(answers)
    wrong = [{**row, "expected": answer} for row, answer in zip(dataset, answers, strict=True)]
    poisoned = slmops.json("retrain", write(tmp_path / "poisoned.jsonl", wrong), *asked)
    assert poisoned["status"] == "kept", poisoned["summary"]
    assert "is worse than house@2" in poisoned["summary"]
    assert poisoned["challenge"]["gain"]["high"] < 0
    assert slmops.json("show", "house@champion")["version"] == 2
