"""Whether the source checkpoint answers chats of given lengths with a text."""

from pathlib import Path

import pytest

from slmops.infra.transformers.calls import AnswerAtLengths
from slmops.infra.transformers.lengths import answer_at_lengths
from tests.support.checkpoints import make_tiny_checkpoint


def ask(checkpoint: Path) -> tuple[bool, ...]:
    call = AnswerAtLengths(checkpoint_dir=checkpoint, prompt_tokens=(32, 64, 3), new_tokens=4, threads=1)
    return answer_at_lengths(call, lambda done, total, what: None)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "checkpoint", tied=False, dtype="float32")


def silence(checkpoint: Path) -> None:
    """Make a control token the most likely next one everywhere: of two opposite rows of lm_head one is positive."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tensors = load_file(checkpoint / "model.safetensors")
    tokens = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids(["<|system|>", "<|user|>"])
    tensors["lm_head.weight"].zero_()
    for token, value in zip(tokens, (1.0, -1.0), strict=True):
        tensors["lm_head.weight"][token] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_a_source_that_writes_only_control_tokens_answers_nothing(checkpoint: Path) -> None:
    assert ask(checkpoint) == (True, True, True)
    silence(checkpoint)
    assert ask(checkpoint) == (False, False, True)  # three tokens are fewer than the template's own
