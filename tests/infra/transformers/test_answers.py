import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.reference.answers import Question, choose_positions
from slmops.infra.reference.decoding import Decoding
from slmops.infra.transformers.answers import (
    STEPS_TOGETHER,
    answer,
    answer_greedily,
    render_question,
)
from slmops.infra.transformers.calls import AnswerAsSource
from slmops.infra.transformers.loading import load_to_answer
from tests.support.checkpoints import VOCABULARY_SIZE, make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.family_configs import make_family, small_config

ROWS = [
    {"id": "short", "messages": [{"role": "user", "content": "hi"}]},
    {"id": "long", "messages": [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 5}]},
    {"id": "other", "messages": [{"role": "user", "content": "Set the bedroom temperature to 21 degrees."}]},
]


def run(checkpoint, directory, progress=lambda done, total, what: None, **changes):
    request = {
        "checkpoint_dir": str(checkpoint),
        "rows": ROWS,
        "max_new_tokens": 12,
        "max_positions": 1000,
        "batch_size": 8,
        "threads": 2,
        "output_dir": str(directory),
    }
    return answer(AnswerAsSource(**request | changes), progress).model_dump(mode="json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("reference") / "checkpoint", tied=False)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def greedy(checkpoint, messages, new_tokens):
    """Greedy answer and its logits, one whole forward pass a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt_length = len(ids)
    while len(ids) < prompt_length + new_tokens and (len(ids) == prompt_length or ids[-1] != tokenizer.eos_token_id):
        with torch.inference_mode():
            last = model(torch.tensor([ids])).logits[0, -1]
        ids = [*ids, int(last.argmax())]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return ids[prompt_length:], logits.numpy()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists what a process has mapped.")
def test_the_file_of_logits_is_not_memory_of_the_process(checkpoint, tmp_path):
    mapped = []
    run(checkpoint, tmp_path, lambda *_: mapped.append("logits.npy" in Path("/proc/self/maps").read_text("utf-8")))
    assert mapped
    assert not any(mapped)


def test_answers_and_logits_are_those_of_a_plain_greedy_loop(checkpoint, tmp_path):
    result = run(checkpoint, tmp_path)
    written = np.load(tmp_path / "logits.npy")
    assert written.dtype == np.float32
    offset = 0
    for row, answered in zip(ROWS, result["rows"], strict=True):
        ids, logits = greedy(checkpoint, row["messages"], 12)
        assert answered["answer_ids"] == ids
        assert answered["positions"] == list(range(len(logits)))
        np.testing.assert_allclose(written[offset : offset + len(logits)], logits, atol=1e-4)
        offset += len(logits)
    assert written.shape == (offset, 512) == (result["positions"], result["vocabulary_size"])


def test_the_batch_size_does_not_change_the_result(checkpoint, tmp_path):
    one, all_at_once = (run(checkpoint, tmp_path / str(size), batch_size=size) for size in (1, 8))
    assert one["answers_sha256"] == all_at_once["answers_sha256"]
    assert one["logits_sha256"] == all_at_once["logits_sha256"]


def test_rows_whose_answers_have_ended_leave_their_batch(checkpoint):
    tokenizer, model = load_to_answer(checkpoint)
    prompts = [render_question(tokenizer, Question(**row)) for row in ROWS]
    torch.set_num_threads(1)  # with more, there are two batches
    rows_of_steps = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows_of_steps.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    def answered(prompts, budgets):
        decoding = Decoding(end_token_ids=())
        silent = {"batch_size": 8, "progress": lambda done, total, what: None, "decoding": decoding}
        return answer_greedily(tokenizer, model, prompts, budgets, **silent)

    together = answered(prompts, [20, 2, 12])
    assert rows_of_steps == [3] * STEPS_TOGETHER + [2] * STEPS_TOGETHER + [1] * (20 - 2 * STEPS_TOGETHER)
    assert together == [*answered(prompts[:1], [20]), *answered(prompts[1:2], [2]), *answered(prompts[2:], [12])]


# Caches of convolutions, of linear attention, of a sliding window and of whole contexts.
@pytest.mark.parametrize(
    "model",
    ["LiquidAI/LFM2-350M", "Qwen/Qwen3.5-0.8B (text)", "google/gemma-3-270m-it", "HuggingFaceTB/SmolLM3-3B"],
)
def test_rows_that_leave_take_their_cache_along(model, checkpoint, tmp_path):
    family = make_family(tmp_path / "family", small_config(model) | {"vocab_size": VOCABULARY_SIZE})
    for file in (*checkpoint.glob("tokenizer*"), *checkpoint.glob("*.jinja")):
        shutil.copy(file, family)
    tokenizer, loaded = load_to_answer(family)
    prompts = [render_question(tokenizer, Question(**row)) for row in ROWS]
    silent = {"batch_size": 8, "progress": lambda done, total, what: None, "decoding": Decoding(end_token_ids=())}
    budgets = [3 * STEPS_TOGETHER, 2, STEPS_TOGETHER + 3]
    together = answer_greedily(tokenizer, loaded, prompts, budgets, **silent)
    for prompt, budget, found in zip(prompts, budgets, together, strict=True):
        assert answer_greedily(tokenizer, loaded, [prompt], [budget], **silent) == [found]


def test_the_result_is_stored_with_the_logits(checkpoint, tmp_path):
    result = run(checkpoint, tmp_path)
    assert json.loads((tmp_path / "reference.json").read_text()) == result


def test_sampling_and_penalties_of_the_checkpoint_are_ignored(checkpoint, tmp_path):
    plain = run(checkpoint, tmp_path / "plain")
    other = make_tiny_checkpoint(tmp_path / "checkpoint", tied=False)
    change_json(
        other / "generation_config.json", do_sample=True, temperature=5.0, repetition_penalty=2.0, min_new_tokens=12
    )
    assert run(other, tmp_path / "sampled")["answers_sha256"] == plain["answers_sha256"]


def test_any_end_token_of_the_generation_config_ends_an_answer(checkpoint, tmp_path):
    third = run(checkpoint, tmp_path / "plain")["rows"][0]["answer_ids"][:3]
    other = make_tiny_checkpoint(tmp_path / "checkpoint", tied=False)
    change_json(other / "generation_config.json", eos_token_id=[511, third[2]])
    stopped = run(other, tmp_path / "stopped")["rows"][0]["answer_ids"]
    assert stopped == third[: third.index(third[2]) + 1]


def test_answers_end_at_the_requested_tokens_and_report_whether_they_ended(checkpoint, tmp_path):
    third = run(checkpoint, tmp_path / "plain")["rows"][0]["answer_ids"][:3]
    rows = run(checkpoint, tmp_path / "ended", decoding={"end_token_ids": [511, third[2]]})["rows"]
    assert rows[0]["answer_ids"] == third[: third.index(third[2]) + 1]
    assert [row["ended"] for row in rows] == [row["answer_ids"][-1] in (511, third[2]) for row in rows]
    assert rows[0]["ended"]


def test_the_requested_repetition_penalty_is_that_of_generate(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    rows = run(checkpoint, tmp_path, decoding={"repetition_penalty": 1.3})["rows"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([rows[0]["prompt_ids"]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.3)[0, ids.shape[1] :]
    assert rows[0]["answer_ids"] == expected.tolist()
    assert rows[0]["answer_ids"] != run(checkpoint, tmp_path / "plain")["rows"][0]["answer_ids"]


def test_at_most_the_requested_number_of_positions_is_compared(checkpoint, tmp_path):
    result = run(checkpoint, tmp_path, max_positions=7)
    assert result["positions"] == 7 == len(np.load(tmp_path / "logits.npy"))
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) - 1 for row in result["rows"]]
    assert [row["positions"] for row in result["rows"]] == choose_positions(lengths, 7)


def test_expected_answers_are_compared_without_outer_white_space(checkpoint, tmp_path):
    answer = run(checkpoint, tmp_path)["rows"][0]["answer"]
    rows = [{**ROWS[0], "expected": f" {answer}\n"}, {**ROWS[1], "expected": "no"}, {**ROWS[2], "expected": None}]
    result = run(checkpoint, tmp_path, rows=rows)
    assert [row["exact_match"] for row in result["rows"]] == [True, False, None]
    assert result["exact_match"] == 0.5


def test_answers_end_at_the_end_of_the_context(tmp_path):
    small = make_tiny_checkpoint(tmp_path / "checkpoint", max_position_embeddings=32)
    rows = [ROWS[0]]
    (row,) = run(small, tmp_path, rows=rows, max_new_tokens=100)["rows"]
    assert row["max_new_tokens"] == 32 - len(row["prompt_ids"])
    assert len(row["prompt_ids"]) + len(row["answer_ids"]) <= 32
    with pytest.raises(BadInput, check=coded("prompt-too-long", "'long'", "32")):
        run(small, tmp_path, rows=[ROWS[1]])


def test_a_row_that_the_template_refuses_is_bad_input(tmp_path):
    gemma_style = make_tiny_checkpoint(tmp_path / "checkpoint", chat_template="gemma")
    rows = [{"id": 9, "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}]
    with pytest.raises(BadInput, check=coded("row-does-not-render", "row 9: System role not supported")):
        run(gemma_style, tmp_path, rows=rows)


def test_a_checkpoint_whose_weights_are_not_numbers_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    broken = make_tiny_checkpoint(tmp_path / "checkpoint", tied=False)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageFailed, check=coded("logits-not-finite")):
        run(broken, tmp_path)


def test_a_folder_that_is_no_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(StageFailed, check=coded("tokenizer-does-not-load")):
        run(tmp_path, tmp_path)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 200))
def test_positions_are_shared_evenly(lengths, most):
    chosen = choose_positions(lengths, most)
    counts = [len(indices) for indices in chosen]
    assert sum(counts) == min(sum(lengths), most)
    for length, indices in zip(lengths, chosen, strict=True):
        assert indices == sorted(set(indices))
        assert all(0 <= index < length for index in indices)
    laid_out = [sum(lengths[:row]) + index for row, indices in enumerate(chosen) for index in indices]
    gaps = {after - before for before, after in itertools.pairwise(laid_out)}
    assert not gaps or max(gaps) - min(gaps) <= 1
