"""Builds in the torch process: what a recipe is calibrated on (never what is judged), and what a user's passes make."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.settings import CalibrationSettings, MachineSettings, Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.build.build import build_variant
from slmops.tasks.build.calibration import calibrate_once, read_calibration_file, write_calibration_file
from slmops.tasks.build.olive_config import read_olive_config
from slmops.tasks.build.recipes import load_recipe
from slmops.tasks.checkpoint.inspection import content_digest, inspect_checkpoint
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.plan import parse_request
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.questions.training_rows import TrainingRow
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.runs.progress import listening
from slmops.tasks.workshop import Workshop, torch_process, working_in
from tests.support.errors import coded

pytestmark = pytest.mark.runtime


def chat(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def judged(asked: str) -> EvaluationRow:
    return EvaluationRow.model_validate({"id": "judged", "messages": chat(asked, "")["messages"][:1]})


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    home = tmp_path_factory.mktemp("calibration") / "home"
    settings = Settings(
        home=home, machine=MachineSettings(threads=1), calibration=CalibrationSettings(max_tokens=600, max_new_tokens=8)
    )
    with torch_process(settings) as child, working_in(Workshop(settings, open_registry(settings), child)) as shop:
        yield shop


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint: Path) -> PreparedCheckpoint:
    return PreparedCheckpoint(
        uri=tiny_checkpoint.as_uri(),
        origin=str(tiny_checkpoint),
        digest=content_digest(tiny_checkpoint),
        inspection=inspect_checkpoint(tiny_checkpoint),
    )


def request(file: str | None = None) -> DeployRequest:
    return parse_request({"checkpoint": "here", "name": "home", "precisions": ["int4"], "calibration_file": file})


class TestFile:
    def test_a_chat_that_is_judged_is_refused(self, tmp_path: Path) -> None:
        file = write(tmp_path / "chats.jsonl", chat("one", "1"), chat("two", "2"))
        assert len(read_calibration_file(file, [judged("three")])) == 2
        with pytest.raises(BadInput, check=coded("calibration-row-judged", "Chat 2", "'judged'")):
            read_calibration_file(file, [judged("two")])

    @pytest.mark.parametrize(
        ("content", "fault"),
        [
            ("", coded("dataset-empty")),
            ("{", coded("dataset-row-not-valid", "line 1")),
            ('{"messages": []}', coded("dataset-row-not-valid", "line 1")),
        ],
    )
    def test_one_that_cannot_be_used_is_refused(self, content: str, fault: coded, tmp_path: Path) -> None:
        (tmp_path / "chats.jsonl").write_text(content, "utf-8")
        with pytest.raises(BadInput, check=fault):
            read_calibration_file(str(tmp_path / "chats.jsonl"), [])


def test_a_finetunings_chats_are_calibrated_on_without_those_that_are_judged(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    rows = [TrainingRow.model_validate(chat(f"ask {number}", "answer")) for number in range(1200)]
    file = write_calibration_file(rows, [judged("ask 0")], settings)
    assert file is not None
    taken = read_calibration_file(file, [judged("ask 0")])
    assert 256 < len(taken) <= 512
    assert taken[0] == rows[1]
    assert write_calibration_file(rows, [judged("ask 0")], settings) == file
    assert write_calibration_file(rows[:1], [judged("ask 0")], settings) is None


class TestTexts:
    def test_by_default_they_are_the_checkpoints_own_answers_to_prompts_that_are_not_judged(
        self, shop: Workshop, prepared: PreparedCheckpoint
    ) -> None:
        made = calibrate_once.fn(request(), prepared, [])
        assert made.answers == len(made.rows) > 10
        assert sum(map(len, made.rows)) >= 600
        without = calibrate_once.fn(request(), prepared, [judged("How does a refrigerator keep food cold?")])
        assert made.rows[0] not in without.rows
        assert set(made.rows[1:]) <= set(without.rows)

    def test_the_same_question_is_answered_once(self, shop: Workshop, prepared: PreparedCheckpoint) -> None:
        told: list[str] = []
        first = calibrate_once.fn(request(), prepared, [])
        with listening(lambda stage, share, what: told.append(what)):
            again = calibrate_once.fn(request(), prepared, [])
        assert (again, again.digest) == (first, first.digest)
        assert "made before" in told

    def test_the_users_chats_come_first_and_own_answers_fill_the_rest(
        self, shop: Workshop, prepared: PreparedCheckpoint, tmp_path: Path
    ) -> None:
        few = calibrate_once.fn(request(write(tmp_path / "few", chat("two and two", "four"))), prepared, [])
        assert (len(few.rows) - few.answers, few.answers > 0) == (1, True)
        assert "1 chats" in few.summary
        many = [chat(f"count to {number}", " ".join(map(str, range(number)))) for number in range(20, 60)]
        enough = calibrate_once.fn(request(write(tmp_path / "many", *many)), prepared, [])
        assert enough.answers == 0
        assert sum(map(len, enough.rows)) == 600

    def test_a_chat_longer_than_the_context_is_refused(
        self, shop: Workshop, prepared: PreparedCheckpoint, tmp_path: Path
    ) -> None:
        context = prepared.inspection.context_length
        file = write(tmp_path / "long", chat("why", "x y " * context))
        with pytest.raises(BadInput, check=coded("calibration-row-too-long", f"context is {context}")):
            calibrate_once.fn(request(file), prepared, [])
        assert not any(shop.settings.cache_dir.glob("builds/*"))


def test_the_same_texts_give_the_same_variant_and_others_another(
    shop: Workshop, prepared: PreparedCheckpoint, tmp_path: Path
) -> None:
    recipe = load_recipe("int4")
    steps: list[str] = []
    made = calibrate_once.fn(request(), prepared, [])
    with listening(lambda stage, share, what: steps.append(what)):
        first = build_variant.fn(recipe, prepared, request(), made)
    assert any(step.startswith("calibrating layer 2 of") for step in steps)
    assert first.calibration == made.summary
    (record,) = (shop.settings.cache_dir / "builds").glob("*.json")
    record.unlink()
    assert build_variant.fn(recipe, prepared, request(), made).variant.digest == first.variant.digest
    file = write(tmp_path / "chats", *(chat(f"say {number}", "abc " * number) for number in range(40)))
    other = calibrate_once.fn(request(file), prepared, [])
    assert build_variant.fn(recipe, prepared, request(), other).variant.digest != first.variant.digest


def test_a_users_passes_whose_result_does_not_run_are_bad_input(
    shop: Workshop, prepared: PreparedCheckpoint, tmp_path: Path
) -> None:
    renamed = {"surgeon": "RenameOutputs", "old_names": ["logits"], "new_names": ["scores"]}
    passes = {
        "builder": {"type": "ModelBuilder", "precision": "int4"},
        "surgeries": {"type": "GraphSurgeries", "surgeries": [renamed]},
    }
    file = tmp_path / "olive.json"
    file.write_text(json.dumps({"passes": passes}), "utf-8")
    before = {*shop.settings.cache_dir.glob("builds/*.json")}
    with pytest.raises(BadInput, check=coded("olive-result-does-not-run", "logits")):
        build_variant.fn(read_olive_config(file), prepared, request())
    assert {*shop.settings.cache_dir.glob("builds/*.json")} == before
