"""A training of the demo that takes seconds."""

import pytest

from slmops.tasks.training import demo as train


@pytest.fixture
def tiny_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of a few seconds: what surrounds the training is under test, not its accuracy."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    architecture = {**train.TRAINING["architecture"], **small, "num_key_value_heads": 1}
    recipe = {**train.TRAINING, "architecture": architecture, "min_exact_match": 0.0, "max_new_tokens": 2}
    monkeypatch.setattr(train, "TRAINING", recipe)
    monkeypatch.setattr(train, "TRAIN_ROWS", 64)
    monkeypatch.setattr(train, "HELD_OUT_ROWS", 20)
