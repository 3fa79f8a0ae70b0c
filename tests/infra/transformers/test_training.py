"""The trainer, end to end with a tiny budget: real tokenizers, torch and transformers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.transformers.calls import TrainChatModel, TrainedChatModel
from slmops.tasks.training.demo import TRAINING
from tests.support.errors import coded
from tests.support.torch_process import TORCH_PROCESS

COLORS = ("red", "green", "blue", "white")
ROWS = [
    {
        "id": f"{color}-{number}",
        "messages": [{"role": "user", "content": f"paint room {number} {color}"}],
        "expected": f'{{"color":"{color}"}}',
        "category": "paint",
    }
    for number in range(1, 26)
    for color in COLORS
]


def _request(directory: Path, **changes: Any) -> dict[str, Any]:
    directory.mkdir()
    for name, rows in (("train", ROWS[8:]), ("eval", ROWS[:8])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    architecture = {**TRAINING["architecture"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return {
        **TRAINING,
        "architecture": {**architecture, "num_attention_heads": 2, "num_key_value_heads": 1},
        "vocabulary_size": 300,
        "epochs": 10,
        "learning_rate": 5e-3,
        "seed": 1,
        "train_file": str(directory / "train.jsonl"),
        "eval_file": str(directory / "eval.jsonl"),
        "output_dir": str(directory / "checkpoint"),
        **changes,
    }


def _train(directory: Path, progress: Any = None, **changes: Any) -> TrainedChatModel:
    request = _request(directory, **changes)
    return run_in_child(
        TrainChatModel(**request),
        deadline_s=300,
        log_path=directory / "log",
        work_dir=directory,
        on_progress=progress,
        within=TORCH_PROCESS,
    ).value


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[tuple[float, float, str]]]:
    directory = tmp_path_factory.mktemp("trained") / "run"
    seen: list[tuple[float, float, str]] = []
    result = _train(directory, lambda done, total, what: seen.append((done, total, what)), threads=1)
    return directory / "checkpoint", result, seen


def test_the_saved_checkpoint_answers_with_the_ordinary_auto_classes(trained: Any) -> None:
    checkpoint, result, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    exact = 0
    for row in ROWS[:8]:
        inputs = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs)  # the generation config alone must be greedy and must end the answer
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        exact += answer == row["expected"] + "<|im_end|>"
    assert result.exact_match == exact / 8 == 1.0
    assert result.eval_rows == 8
    assert result.parameters == model.num_parameters()


def test_it_is_a_normal_checkpoint(trained: Any) -> None:
    checkpoint, _, _ = trained
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["vocab_size"] % 32 == 0
    assert AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    generation = GenerationConfig.from_pretrained(checkpoint)
    assert tokenizer.eos_token == "<|im_end|>"
    assert generation.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert generation.do_sample is False
    assert [json.loads(line) for line in (checkpoint / "eval.jsonl").open()] == ROWS[:8]
    assert {path.name for path in checkpoint.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "eval.jsonl"),
    }


@pytest.mark.parametrize(
    "text", ["Set 21 degrees at 07:30.", "  two  spaces\n\n", "naïve 東京 'quoted' it's", '{"a":1}']
)
def test_the_tokenizer_gives_every_text_back(text: str, trained: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_names_of_roles_are_single_tokens(trained: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    assert [len(tokenizer.encode(role)) for role in ("user", "assistant")] == [1, 1]


def test_progress_names_the_loss(trained: Any) -> None:
    _, result, seen = trained
    steps = [(done, what) for done, _, what in seen if what.startswith("training: loss ")]
    assert [done for done, _ in steps] == list(range(1, result.steps + 1))
    assert {total for _, total, _ in seen} == {result.steps}
    assert float(steps[-1][1].removeprefix("training: loss ")) < float(steps[0][1].removeprefix("training: loss "))


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> str:
        _train(tmp_path / name, epochs=2, seed=seed, min_exact_match=0.0)
        return hashlib.sha256((tmp_path / name / "checkpoint/model.safetensors").read_bytes()).hexdigest()

    first = digest("first", 1)
    assert digest("second", 1) == first
    assert digest("third", 2) != first


def test_a_model_that_did_not_learn_fails_loudly(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, check=coded("model-did-not-learn", "0.95", "row red-1")):
        _train(tmp_path / "run", epochs=1, learning_rate=1e-6)


def test_no_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(BadInput, check=coded("training-file-empty")):
        _train(tmp_path / "run", train_file=str(tmp_path / "empty.jsonl"))
