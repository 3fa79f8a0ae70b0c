"""Every family in Foundry Local: its tiny model with the family's real tokenizer and chat template, built and corrected
as a deploy does it, has the tokens that transformers gives, and Foundry's runtime answers as onnxruntime-genai does."""

import functools
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.foundry.runtime import answer_unchecked, open_local_catalog
from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.genai.served_files import mend_files
from slmops.infra.olive.genai_builder import make_model
from slmops.infra.process.call import Call, Progress
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.records import AbsolutePath
from slmops.infra.reference.answers import Question
from slmops.infra.transformers.answers import render_question
from slmops.infra.transformers.tokenizer import load_tokenizer
from tests.support.family_checkpoints import REAL_FAMILIES, TOKENIZER_OF, is_left_out, save_real_tokenizer
from tests.support.family_configs import REAL, make_family, small_config

QUESTION = Question(id=1, messages=({"role": "user", "content": "Turn on the 2 lights in the kitchen, please."},))
NEW_TOKENS = 8
IN_FLOATING_POINT = ("openai/gpt-oss-20b",)
ANOTHER = ("meta-llama/Llama-3.1-8B-Instruct", "deepseek-r1-distill-llama")  # the same configuration
# Configurations, each with the family whose real tokenizer it gets; None is the tests' own tokenizer.
CASES = [
    *((model, None if is_left_out(TOKENIZER_OF.get(model, "")) else TOKENIZER_OF.get(model)) for model in REAL),
    *(() if is_left_out(ANOTHER[1]) else (ANOTHER,)),
]
NUMBERS = itertools.count(1)


@functools.cache
def catalog_of_this_process(cache_dir: Path) -> Any:
    return open_local_catalog(cache_dir)


class AnswerInFoundry(Call[str]):
    """Load a folder in the runtime of this process, which stays, and return its answer to the question."""

    folder: AbsolutePath
    cache_dir: AbsolutePath
    number: int

    def perform(self, progress: Progress) -> str:
        from foundry_local_sdk import ModelInfoBuilder

        with ModelInfoBuilder() as metadata:
            metadata.set_string_property("task", "chat-completion")
            name = f"family{self.number}-int4-generic-cpu:1"
            model = catalog_of_this_process(self.cache_dir).register_model(str(self.folder), name, metadata)
        model.load()
        answer = answer_unchecked(model, QUESTION.messages, NEW_TOKENS)
        model.unload()
        return answer


@pytest.fixture(scope="module")
def foundry() -> Iterator[ChildProcess]:
    with ChildProcess() as process:
        yield process


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foundry")


def checkpoint_of(model: str, family: str | None, directory: Path, tiny_checkpoint: Path) -> Path:
    """Return a checkpoint of the model's shape with a family's real tokenizer, or, without a family, the tests' own."""
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir()
    size = {}
    if family:
        size["vocab_size"] = save_real_tokenizer(REAL_FAMILIES[family], tokenizer)
    else:
        for path in (*tiny_checkpoint.glob("tokenizer*"), *tiny_checkpoint.glob("chat_template*")):
            shutil.copy(path, tokenizer)
    checkpoint = make_family(directory / "checkpoint", {**small_config(model), **size})
    return Path(shutil.copytree(tokenizer, checkpoint, dirs_exist_ok=True))


@pytest.mark.parametrize(("model", "family"), CASES)
def test_foundry_answers_as_genai_does(
    model: str, family: str | None, tmp_path: Path, cache_dir: Path, foundry: ChildProcess, tiny_checkpoint: Path
) -> None:
    checkpoint = checkpoint_of(model, family, tmp_path, tiny_checkpoint)
    built = tmp_path / "built"
    built.mkdir()
    make_model(checkpoint, built, {"precision": "fp16" if model in IN_FLOATING_POINT else "int4"})
    mend_files(built, checkpoint)
    genai = GenaiModel(built, threads=1)
    text, prompt = genai.render(QUESTION.messages)
    assert (text, prompt) == render_question(load_tokenizer(checkpoint), QUESTION)
    call = AnswerInFoundry(folder=built, cache_dir=cache_dir, number=next(NUMBERS))
    answer = foundry.run(call, deadline_s=120, log_path=tmp_path / "log", work_dir=tmp_path).value
    assert answer == genai.decode(genai.answer(prompt, NEW_TOKENS))
