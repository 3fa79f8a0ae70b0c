"""Fine-tuning with the real Trainer on a tiny checkpoint: it learns, stops, goes on after a kill, and loads back."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from slmops.infra.errors import BadInput, PassingFault
from slmops.infra.process.call import ChildResult
from slmops.infra.process.supervisor import ChildProcess, run_in_child
from slmops.infra.transformers.calls import FineTune, FineTuned
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.torch_process import TORCH_PROCESS

pytestmark = pytest.mark.slow

WORDS = ("add", "print", "def", "return", "hello", "world", "good")


def chat(number: int, answer: str | None = None) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"say {WORDS[number % len(WORDS)]}"},
        {"role": "assistant", "content": answer or f"{WORDS[number % len(WORDS)]} {number % len(WORDS)}"},
    ]


def numbered(chats: list[list[dict[str, str]]]) -> list[dict[str, Any]]:
    return [{"number": number, "messages": messages} for number, messages in enumerate(chats, 1)]


TRAIN = numbered([chat(number) for number in range(42)])


def asked(base: Path, folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "base_dir": str(base),
        "train": TRAIN,
        "held_out": numbered([chat(number) for number in range(7)]),
        "method": "lora",
        "lora_rank": 8,
        "epochs": 3,
        "learning_rate": 5e-3,
        "batch_size": 7,
        "max_length": None,
        "patience": 2,
        "seed": 1,
        "threads": 1,
        "state_dir": str(folder / "states"),
        "output_dir": str(folder / "tuned"),
        **options,
    }


def tune(
    base: Path, folder: Path, *, on_progress: Any = None, within: ChildProcess | None = TORCH_PROCESS, **options: Any
) -> ChildResult[FineTuned]:
    return run_in_child(
        FineTune(**asked(base, folder, **options)),
        deadline_s=300,
        log_path=folder / "log",
        work_dir=folder / "work",
        on_progress=on_progress,
        within=within,
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_and_loads_back_to_the_same_loss(tiny_checkpoint: Path, tmp_path: Path, method: str) -> None:
    steps: list[tuple[float, float, str]] = []
    found = tune(tiny_checkpoint, tmp_path, method=method, on_progress=lambda *step: steps.append(step)).value
    first, last = found.losses[0], found.losses[-1]
    assert last.train_loss < first.train_loss / 2
    assert found.loaded_held_out_loss == pytest.approx(found.held_out_loss, rel=0.01, abs=0.01)
    assert found.steps == 18
    assert any("step 18 of 18, loss" in what for _, _, what in steps)
    names = {path.name for path in (tmp_path / "tuned").iterdir()}
    weights = {
        "lora": {"adapter_model.safetensors", "adapter_config.json"},
        "full": {"model.safetensors", "config.json"},
    }
    assert weights[method] <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]


def test_only_answers_are_learned(tiny_checkpoint: Path) -> None:
    from slmops.infra.transformers.fine_tuning import IGNORED_LABEL, _encode_chat
    from slmops.infra.transformers.loading import load_checkpoint

    tokenizer, _ = load_checkpoint(tiny_checkpoint, "float32")
    encoded = _encode_chat(tokenizer, [*chat(1, "first"), *chat(2, "second")])
    learned = [token for token in encoded["labels"] if token != IGNORED_LABEL]
    text = tokenizer.decode(learned)
    assert text.startswith("first")
    assert "second" in text
    assert "say" not in text
    assert "user" not in text


def test_the_same_seed_gives_the_same_losses(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one, two = (tune(tiny_checkpoint, tmp_path / name, epochs=1).value.losses for name in ("one", "two"))
    assert one == two


def test_a_killed_run_goes_on_from_its_last_epoch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def kill_in_the_second_epoch(done: float, total: float, what: str) -> None:
        if what.startswith("training: step 9 "):
            for child in psutil.Process().children():
                if FineTune.target() in child.cmdline():
                    child.kill()
            time.sleep(0.1)

    with pytest.raises(PassingFault):
        tune(tiny_checkpoint, tmp_path, on_progress=kill_in_the_second_epoch, within=None)
    assert not (tmp_path / "tuned").exists()
    found = tune(tiny_checkpoint, tmp_path).value
    assert found.resumed_at_step in (6, 12)
    assert found.steps == 18
    whole = tune(tiny_checkpoint, tmp_path / "whole").value
    assert found.held_out_loss == pytest.approx(whole.held_out_loss, rel=0.05)


def test_it_stops_when_the_held_out_loss_does_not_fall(tiny_checkpoint: Path, tmp_path: Path) -> None:
    contrary = numbered([chat(number, "no") for number in range(7)])
    found = tune(tiny_checkpoint, tmp_path, held_out=contrary, epochs=12, patience=1).value
    assert found.steps < 12 * 6
    assert found.best_step < found.steps


def test_a_chat_longer_than_the_context_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, check=coded("chat-too-long", "1 of 3", "64 tokens", "row 2")):
        tune(tiny_checkpoint, tmp_path, train=numbered([chat(1), chat(2, "word " * 200), chat(3)]), max_length=64)
    assert not (tmp_path / "tuned").exists()


def test_a_base_whose_layers_lora_does_not_know_is_refused(tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", "gpt2")
    with pytest.raises(BadInput, check=coded("lora-layers-unknown", "GPT2")):
        tune(base, tmp_path)
