"""Every family in Foundry Local: its runtime loads a built model of each, and answers as onnxruntime-genai does."""

import shutil
from pathlib import Path

import pytest

from slmops.infra.foundry.runtime import answer_unchecked, open_local_catalog
from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.olive.genai_builder import make_model
from slmops.infra.process.call import Call, Progress
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.records import AbsolutePath
from tests.support.family_configs import REAL, make_family, small_config

QUESTION = [{"role": "user", "content": "Turn on the lights in the kitchen, please."}]
NEW_TOKENS = 8
IN_FLOATING_POINT = ("openai/gpt-oss-20b",)


class AnswerInFoundry(Call[dict[str, str]]):
    """Load the folders one after another in one runtime, and return each one's answer."""

    folders: dict[str, AbsolutePath]
    cache_dir: AbsolutePath

    def perform(self, progress: Progress) -> dict[str, str]:
        catalog = open_local_catalog(self.cache_dir)
        from foundry_local_sdk import ModelInfoBuilder

        answers = {}
        for number, (name, folder) in enumerate(self.folders.items()):
            with ModelInfoBuilder() as metadata:
                metadata.set_string_property("task", "chat-completion")
                model = catalog.register_model(str(folder), f"family{number}-int4-generic-cpu:1", metadata)
            model.load()
            answers[name] = answer_unchecked(model, QUESTION, NEW_TOKENS)
            model.unload()
        return answers


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Path]:
    folders = {}
    for number, model in enumerate(REAL):
        work = tmp_path_factory.mktemp(f"family-{number}")
        checkpoint = make_family(work / "checkpoint", small_config(model))
        for path in (*tiny_checkpoint.glob("tokenizer*"), *tiny_checkpoint.glob("chat_template*")):
            shutil.copy(path, checkpoint)
        folders[model] = work / "built"
        folders[model].mkdir()
        make_model(checkpoint, folders[model], {"precision": "fp16" if model in IN_FLOATING_POINT else "int4"})
    return folders


@pytest.fixture(scope="module")
def answers(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    work = tmp_path_factory.mktemp("foundry")
    call = AnswerInFoundry(folders=built, cache_dir=work / "cache")
    return run_in_child(call, deadline_s=300, log_path=work / "log", work_dir=work / "work").value


@pytest.mark.parametrize("model", REAL)
def test_foundry_answers_as_genai_does(model: str, built: dict[str, Path], answers: dict[str, str]) -> None:
    genai = GenaiModel(built[model], threads=1)
    _, prompt = genai.render(QUESTION)
    assert answers[model] == genai.decode(genai.answer(prompt, NEW_TOKENS))
