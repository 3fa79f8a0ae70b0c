"""Two batches at a time, unless a batch changes the rotary embedding of the one beside it."""

import threading
from collections.abc import Iterator

import pytest
import torch

from slmops.infra.transformers.lanes import in_lanes, lanes_of


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model_with(rope_type: object) -> torch.nn.Module:
    model, rope = torch.nn.Sequential(), torch.nn.Identity()
    rope.rope_type = rope_type
    model.append(rope)
    return model


def test_two_works_run_at_the_same_time_with_a_thread_each_and_their_results_are_in_order() -> None:
    met = threading.Barrier(2, timeout=60)

    def work(number: int) -> tuple[int, int]:
        met.wait()
        return number, torch.get_num_threads()

    assert [*in_lanes(model_with("default"), work, [3, 1, 4, 2])] == [(3, 1), (1, 1), (4, 1), (2, 1)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", {"full_attention": "longrope"}])
def test_a_model_whose_rotary_embedding_changes_gets_one_batch_at_a_time(rope_type: object) -> None:
    model, here = model_with(rope_type), threading.get_ident()
    assert lanes_of(model) == 1
    assert [*in_lanes(model, lambda number: (number, threading.get_ident()), [1, 2])] == [(1, here), (2, here)]


def test_transformers_rotary_embeddings_name_their_type() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Phi3Config(**sizes, num_key_value_heads=2, vocab_size=32, pad_token_id=0, rope_parameters=rope)
    assert lanes_of(Phi3ForCausalLM(config)) == 1
