"""The proof of a model that reasons: Foundry Local's answer and the evaluated one are compared without thoughts."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import StageFailed
from slmops.infra.foundry.calls import Prove, ProvenAnswer
from slmops.infra.genai.calls import AnsweredRow
from slmops.infra.reasoning import FORMS
from slmops.infra.reference.answers import Thoughts
from slmops.infra.reference.thinking import Thinking
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.version import Variant
from slmops.tasks.foundry import proof
from slmops.tasks.questions.evaluation_set import EvaluationRow
from tests.support.errors import coded
from tests.support.versions import store_version
from tests.tasks.verdict.test_gate import evaluation

ROW = EvaluationRow.model_validate({"id": 1, "messages": [{"role": "user", "content": "Light!"}]})
THINKING = Thinking(marks=FORMS[-1], max_tokens=64)
DONE = Thoughts(text="A lamp.", tokens=7, ended=True)
ENDLESS = Thoughts(text="A lamp, a", tokens=9, ended=False)


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    registry = open_registry(Settings(home=tmp_path / "home"))
    manifest = store_version(registry, tmp_path / "model", {"genai_config.json": json.dumps({"search": {}}).encode()})
    return registry.of(manifest).variants[0]


class Foundry:
    """In place of the runtime, which gives thoughts as a part of the answer or apart, by what it knows of the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
        self.answer, self.asked, self.unregistered = answer, 0, False
        monkeypatch.setattr(proof, "ask_foundry", self.ask)
        monkeypatch.setattr(proof, "unregister_variant", self.unregister)
        monkeypatch.setattr(proof, "seen_by_command", lambda *_: None)

    def ask(self, call: Prove, *_: Any) -> ProvenAnswer:
        self.asked = call.max_new_tokens
        return ProvenAnswer(
            model_id=call.model_id,
            alias="home",
            folder="",
            load_ms=1.0,
            answer=self.answer,
            reasoning="",
            prompt_tokens=3,
            completion_tokens=9,
            finish_reason="stop",
            e2e_latency_ms=1.0,
        )

    def unregister(self, *_: Any) -> None:
        self.unregistered = True


def evaluated(answer: str, thoughts: Thoughts | None) -> AnsweredRow:
    plain = evaluation().rows[0].model_dump(include=set(AnsweredRow.model_fields))
    return AnsweredRow.model_validate(plain | {"answer": answer, "thoughts": thoughts})


@pytest.mark.parametrize(
    ("answer", "expected", "thoughts", "tokens"),
    [
        ("<think>\nA lamp.</think>\n\nIt is on.", "It is on.", DONE, 7 + 128),
        ("It is on.", "It is on.", DONE, 7 + 128),
        ("A lamp.</think>It is on.", "It is on.", DONE, 7 + 128),
        ("A lamp, a", "", ENDLESS, 9),
        ("<think>A lamp, a", "", ENDLESS, 9),
        ("It is on.", "It is on.", None, 128),
    ],
)
def test_the_answers_are_compared_without_thoughts(
    monkeypatch: pytest.MonkeyPatch,
    variant: Variant,
    tmp_path: Path,
    answer: str,
    expected: str,
    thoughts: Thoughts | None,
    tokens: int,
) -> None:
    foundry, settings = Foundry(monkeypatch, answer), Settings(home=tmp_path / "home")
    proven = proof.prove_variant.fn(variant, ROW, evaluated(expected, thoughts), THINKING, settings)
    assert (proven.answer, foundry.asked, foundry.unregistered) == (answer, tokens, False)
    again = proof.repeat_proof.fn(variant, ROW, proven, settings)
    assert (again.answer, again.marks) == (answer, THINKING.marks)


def test_another_answer_behind_the_thoughts_takes_the_model_back(
    monkeypatch: pytest.MonkeyPatch, variant: Variant, tmp_path: Path
) -> None:
    foundry = Foundry(monkeypatch, "<think>\nA lamp.</think>\n\nIt is off.")
    with pytest.raises(StageFailed, check=coded("foundry-answers-differently", "It is on.")):
        proof.prove_variant.fn(variant, ROW, evaluated("It is on.", DONE), THINKING, Settings(home=tmp_path / "home"))
    assert foundry.unregistered
