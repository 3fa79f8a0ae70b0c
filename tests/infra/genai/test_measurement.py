import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from slmops.infra.errors import StageFailed
from slmops.infra.genai.calls import Measure
from slmops.infra.genai.measurement import measure
from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.genai.timing import benchmark_prompt, chat_prompt, time_request
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model

SWEEP = {"max_prompt_tokens": None, "new_tokens": 6, "repetitions": 2, "budget_s": 60.0, "max_cliff_ratio": 1e9}


def ignore_progress(done, total, what):
    assert 0 <= done <= total
    assert what


def run_measure(model_dir, **changes):
    request = {
        "model_dir": str(model_dir),
        "prompt_tokens": [16],
        "new_tokens": 8,
        "warmup": 1,
        "repetitions": 3,
        "threads": 1,
    }
    return measure(Measure(**request | changes), ignore_progress).model_dump(mode="json")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    work = tmp_path_factory.mktemp("genai")
    return build_genai_model(make_tiny_checkpoint(work / "checkpoint", tied=False), work / "fp32")


def test_a_disturbed_round_is_measured_again_and_an_undisturbed_one_is_not(fp32):
    quiet, busy = run_measure(fp32), run_measure(fp32, max_others_cpu_share=-1.0)
    assert (quiet["rounds"], busy["rounds"]) == (1, 3)
    assert [len(found["rows"]) for found in (quiet, busy)] == [3, 3]
    assert 0 <= busy["others_cpu_share"] <= 1
    assert run_measure(fp32, max_spread=-1.0)["rounds"] == 3


@pytest.fixture
def damaged(fp32, tmp_path):
    return shutil.copytree(fp32, tmp_path / "damaged")


def change_genai_config(model_dir, change):
    path = model_dir / "genai_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def break_positions(model_dir, first):
    """Put NaN into the rotary tables from a position on: the model breaks in long prompts only."""
    model = onnx.load(model_dir / "model.onnx")
    tables = [tensor for tensor in model.graph.initializer if "cos_cache" in tensor.name]
    assert tables
    for tensor in tables:
        array = numpy_helper.to_array(tensor).copy()
        array[first:] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    (model_dir / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, model_dir / "model.onnx", save_as_external_data=True, location="model.onnx.data")


def test_a_measurement_has_every_repetition_and_leaves_the_folder_alone(fp32):
    before = {path: path.stat().st_mtime_ns for path in fp32.rglob("*")}
    result = run_measure(fp32, prompt_tokens=[16, 40])
    assert {path: path.stat().st_mtime_ns for path in fp32.rglob("*")} == before
    assert [(row["prompt_tokens"], row["new_tokens"], row["repetition"]) for row in result["rows"]] == [
        (16, 8, 0),
        (16, 8, 1),
        (16, 8, 2),
        (40, 8, 0),
        (40, 8, 1),
        (40, 8, 2),
    ]
    for row in result["rows"]:
        assert len(row["inter_token_latencies_ms"]) == 7
        # The whole request also makes the generator, which is no part of the time to the first token.
        assert row["e2e_latency_ms"] > row["ttft_ms"] + sum(row["inter_token_latencies_ms"]) > row["ttft_ms"] > 0
        assert row["inter_token_latency_ms"] * row["token_generation_throughput_tps"] == pytest.approx(1000)
        assert row["prompt_processing_throughput_tps"] > 1000 * row["prompt_tokens"] / row["ttft_ms"]
    assert result["load_ms"] > 0
    assert result["cpu_percent"] >= 0
    assert result["peak_rss_bytes"] > result["size_bytes"]
    assert result["size_bytes"] == sum(path.stat().st_size for path in fp32.iterdir())
    assert result["threads"] == 1
    assert result["notes"] == []
    assert result["sweep"] == []
    assert result["hardware"]["ram_bytes"] > 0
    assert result["versions"]["onnxruntime-genai"]
    json.dumps(result, allow_nan=False)


def test_the_end_token_does_not_end_a_measured_request(damaged):
    change_genai_config(damaged, lambda config: config["model"].update(eos_token_id=list(range(500))))
    assert all(len(row["inter_token_latencies_ms"]) == 7 for row in run_measure(damaged)["rows"])


def test_lengths_are_clipped_to_the_context_with_a_note(damaged):
    change_genai_config(damaged, lambda config: config["model"].update(context_length=64))
    result = run_measure(damaged, prompt_tokens=[16, 128, 4096], new_tokens=8, warmup=0, repetitions=1)
    assert [(row["prompt_tokens"], row["new_tokens"]) for row in result["rows"]] == [(16, 8), (56, 8)]
    assert len(result["notes"]) == 2
    assert "128 prompt and 8 new tokens were clipped to 56 and 8: the model's context is 64" in result["notes"][0]


def test_the_sweep_goes_up_to_the_context_and_every_answer_is_valid(fp32):
    result = run_measure(fp32, sweep=SWEEP)
    rows = result["sweep"]
    lengths = [32, 64, 128, 256, 512, 1018]
    assert [(row["prompt_tokens"], row["repetition"]) for row in rows] == [(n, i) for n in lengths for i in range(2)]
    assert all(row["finite_logits"] and row["answered"] for row in rows)
    assert all(row["ttft_ms"] > 0 and row["token_generation_throughput_tps"] > 0 for row in rows)
    assert {(row["new_tokens"], row["round"]) for row in rows} == {(6, 0)}
    assert result["sweep_notes"] == []
    assert len(result["rows"]) == 3


def test_a_model_that_breaks_in_long_prompts_is_found_out(damaged):
    break_positions(damaged, 260)
    rows = run_measure(damaged, sweep=SWEEP | {"repetitions": 1})["sweep"]
    # With 256 prompt tokens only the answer gets there: the check is also after each generated token.
    assert {row["prompt_tokens"]: row["finite_logits"] for row in rows} == {
        32: True,
        64: True,
        128: True,
        256: False,
        512: False,
        1018: False,
    }


def test_answers_of_control_tokens_alone_are_empty(damaged):
    tokenizer = json.loads((damaged / "tokenizer.json").read_text())
    added = {token["id"] for token in tokenizer["added_tokens"]}
    text = [token for token in range(512) if token not in added]
    change_genai_config(damaged, lambda config: config["model"].update(eos_token_id=text))  # and those are suppressed
    result = run_measure(damaged, sweep=SWEEP | {"repetitions": 1})
    assert [row["answered"] for row in result["sweep"]] == [False] * 6
    assert all(row["finite_logits"] for row in result["sweep"])


def test_without_a_chat_template_the_answers_are_not_judged(damaged):
    (damaged / "chat_template.jinja").unlink()
    result = run_measure(damaged, sweep=SWEEP | {"repetitions": 1})
    assert [row["answered"] for row in result["sweep"]] == [None] * 6
    (note,) = result["sweep_notes"]
    assert "answers were not judged" in note
    assert "chat" in note


@pytest.mark.parametrize(("context_length", "lengths"), [(48, [32, 42]), (24, [18]), (6, [])])
def test_a_small_context_has_few_lengths(damaged, context_length, lengths):
    change_genai_config(damaged, lambda config: config["model"].update(context_length=context_length))
    result = run_measure(damaged, prompt_tokens=[2], new_tokens=2, sweep=SWEEP | {"repetitions": 1})
    assert [row["prompt_tokens"] for row in result["sweep"]] == lengths
    assert bool(result["sweep_notes"]) == (not lengths)


def test_a_chat_of_any_length_keeps_the_complete_template(fp32):
    model = GenaiModel(fp32, threads=1)
    chat = chat_prompt(model)
    begin, end = (
        model.tokenizer.encode(text) for text in ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    )
    assert chat.before.tolist() == list(begin)
    assert chat.after.tolist()[-len(end) :] == list(end)
    for length in (32, 333):
        ids = chat.of_length(length).tolist()
        assert len(ids) == length
        assert (ids[: len(begin)], ids[-len(end) :]) == (list(begin), list(end))
    assert chat.of_length(len(chat.before) + len(chat.after)) is None


def test_the_checked_logits_are_those_that_the_tokens_were_chosen_by(fp32):
    model = GenaiModel(fp32, threads=1)
    chosen, answer = [], []
    time_request(
        model,
        benchmark_prompt(model, 20),
        5,
        on_logits=lambda logits: chosen.append(int(np.argmax(logits))),
        on_answer=answer.extend,
    )
    assert chosen == answer == model.answer(benchmark_prompt(model, 20).tolist(), 5)


def test_a_model_that_cannot_run_is_a_clear_error(damaged):
    model = onnx.load(damaged / "model.onnx", load_external_data=False)
    model.graph.node[3].op_type = "NoSuchOperator"
    onnx.save(model, damaged / "model.onnx")
    with pytest.raises(StageFailed, check=coded("model-does-not-open", "NoSuchOperator")):
        run_measure(damaged, sweep=SWEEP)
