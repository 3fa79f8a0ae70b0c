"""The recorded answer of a registered model, which another machine's answer is compared with."""

from typing import Any

import pytest

from slmops.infra.reasoning import ThoughtMarks
from slmops.tasks.foundry.proof import Proof

FIGURES: Any = {"load_ms": 1.0, "e2e_latency_ms": 1.0, "prompt_tokens": 3, "completion_tokens": 3}
MARKS = ThoughtMarks(start="<think>", end="</think>")
THOUGHTS = "<think>A lamp.</think>\nDone."


@pytest.mark.parametrize("recorded", ["Done.", THOUGHTS])
@pytest.mark.parametrize("found", ["Done.", THOUGHTS, "A lamp.</think>\nDone."])
def test_thoughts_do_not_make_another_answer(recorded: str, found: str) -> None:
    proof = Proof(model_id="a:1", question="Light?", answer=recorded, marks=MARKS, **FIGURES)
    assert proof.has_answer(found)
    assert not proof.has_answer(found.replace("Done", "No"))


def test_without_marks_the_whole_answer_counts() -> None:
    proof = Proof(model_id="a:1", question="Light?", answer="Done.", **FIGURES)
    assert proof.has_answer(" Done.\n")
    assert not proof.has_answer(THOUGHTS)
