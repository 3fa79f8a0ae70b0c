import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from slmops.infra.errors import StageFailed
from slmops.infra.genai import runtime
from slmops.infra.genai.calls import Evaluate, Generate, Measure
from slmops.infra.genai.evaluation import evaluate
from slmops.infra.genai.measurement import measure
from slmops.infra.settings import GateSettings
from slmops.infra.transformers.answers import answer
from slmops.infra.transformers.calls import AnswerAsSource
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.verdict.gate import judge
from slmops.tasks.verdict.thresholds import thresholds_for
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model, with_a_slice, with_weights_set

ROWS = [
    {"id": 1, "messages": [{"role": "user", "content": "Turn on the lights in the kitchen, please."}]},
    {"id": 2, "messages": [{"role": "user", "content": "What is the capital of France? Übergrößen, 東京"}]},
    {
        "id": "three",
        "messages": [
            {"role": "system", "content": "You answer with JSON."},
            {"role": "user", "content": "Set the bedroom temperature to 21 degrees."},
        ],
    },
]
NEW_TOKENS = 24


def ignore_progress(done, total, what):
    assert 0 <= done <= total
    assert what


def run_reference(checkpoint, directory, rows=ROWS, **changes):
    request = {"checkpoint_dir": str(checkpoint), "output_dir": str(directory), "rows": rows, **changes}
    sizes = {"max_new_tokens": NEW_TOKENS, "max_positions": 60, "batch_size": 2, "threads": 2}
    return answer(AnswerAsSource(**sizes | request), ignore_progress).model_dump(mode="json")


def run_evaluate(model_dir, reference_dir, progress=ignore_progress, **changes):
    request = {
        "model_dir": str(model_dir),
        "rows": ROWS,
        "reference_dir": None if reference_dir is None else str(reference_dir),
        "max_new_tokens": NEW_TOKENS,
        "max_positions": 60,
        "threads": 2,
    }
    return evaluate(Evaluate(**request | changes), progress).model_dump(mode="json")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("genai")


@pytest.fixture(scope="module")
def checkpoint(work):
    return make_tiny_checkpoint(work / "checkpoint", tied=False)  # tied random weights repeat their last token


@pytest.fixture(scope="module")
def reference_dir(work, checkpoint):
    run_reference(checkpoint, work / "reference")
    return work / "reference"


@pytest.fixture(scope="module")
def fp32(work, checkpoint):
    return build_genai_model(checkpoint, work / "fp32")


@pytest.fixture
def damaged(fp32, tmp_path):
    return shutil.copytree(fp32, tmp_path / "damaged")


def change_genai_config(model_dir, change):
    path = model_dir / "genai_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists what a process has mapped.")
def test_the_reference_s_file_of_logits_is_not_memory_of_the_process(fp32, reference_dir):
    mapped = []
    run_evaluate(
        fp32, reference_dir, lambda *_: mapped.append("logits.npy" in Path("/proc/self/maps").read_text("utf-8"))
    )
    assert mapped
    assert not any(mapped)


def test_a_full_precision_build_agrees_with_the_reference(fp32, reference_dir):
    result = run_evaluate(fp32, reference_dir)
    assert result["positions"] == 60
    assert result["top1_agreement"] == 1.0
    assert result["kl_divergence"] < 1e-6
    assert result["kl_divergence"] <= result["kl_divergence_p99"]
    assert result["finite_logits"] == 1.0
    assert result["identical_answers"] == 1.0
    assert result["template_mismatches"] == {"count": 0, "example": None}
    assert result["perplexity"] == pytest.approx(result["reference_perplexity"], rel=1e-4)
    assert [row["id"] for row in result["rows"]] == [1, 2, "three"]
    json.dumps(result, allow_nan=False)


def test_figures_follow_from_the_reference_s_logits(fp32, reference_dir, tmp_path):
    """A variant whose logits are all zero is uniform: its divergence is ln V minus the reference's entropy."""
    uniform = with_weights_set(fp32, tmp_path / "uniform", "lm_head", 0.0)
    logits = np.load(reference_dir / "logits.npy").astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    content = json.loads((reference_dir / "reference.json").read_text())
    next_tokens = [
        (row["prompt_ids"] + row["answer_ids"])[position + 1]
        for row in content["rows"]
        for position in row["positions"]
    ]
    entropy = -(np.exp(log_p) * log_p).sum(axis=1)
    result = run_evaluate(uniform, reference_dir)
    assert result["kl_divergence"] == pytest.approx(np.mean(np.log(512) - entropy), rel=1e-6)
    assert result["kl_divergence_p99"] == pytest.approx(np.percentile(np.log(512) - entropy, 99), rel=1e-6)
    assert result["perplexity"] == pytest.approx(512)
    surprise = -log_p[np.arange(len(next_tokens)), next_tokens]
    assert result["reference_perplexity"] == pytest.approx(np.exp(surprise.mean()), rel=1e-6)
    means = [row_mean(content, row, np.log(512) - entropy) for row in content["rows"]]
    assert [row["kl_divergence"] for row in result["rows"]] == pytest.approx(means, rel=1e-6)


def row_mean(content, row, values):
    offset = 0
    for other in content["rows"]:
        if other is row:
            break
        offset += len(other["positions"])
    return values[offset : offset + len(row["positions"])].mean()


@pytest.mark.parametrize("threads", [1, 4])
def test_the_runtime_computes_with_the_requested_number_of_threads(fp32, threads):
    program = f"""
import onnxruntime_genai, pathlib, psutil
from slmops.infra.genai import runtime
before = psutil.Process().num_threads()
model = runtime.GenaiModel(pathlib.Path({str(fp32)!r}), threads={threads})
print(psutil.Process().num_threads() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads - 1


def test_waiting_threads_spin_only_where_a_speed_is_measured(fp32, reference_dir, monkeypatch):
    """Beside other processes, a spinning thread takes the core from the one that it waits for."""
    spun = []
    told = runtime.threading_options
    monkeypatch.setattr(
        runtime, "threading_options", lambda threads, *, spin: spun.append(spin) or told(threads, spin=spin)
    )
    run_evaluate(fp32, reference_dir)
    measure(
        Measure(model_dir=fp32, prompt_tokens=[4], new_tokens=2, warmup=0, repetitions=1, threads=2), ignore_progress
    )
    assert spun == [False, True]
    assert told(2, spin=False)["session.intra_op.allow_spinning"] == "0"


class WatchedModel(runtime.GenaiModel):
    """Counts what its generators are fed in one pass, and the tokens that they generate one by one."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.passes, self.generated = [], 0

    def start(self, *sizes):
        generator = super().start(*sizes)

        def append_tokens(ids):
            self.passes.append(len(ids))
            generator.append_tokens(ids)

        def generate_next_token():
            self.generated += 1
            generator.generate_next_token()

        names = ("get_output", "get_sequence", "get_next_tokens", "is_done")
        kept = {name: getattr(generator, name) for name in names}
        return SimpleNamespace(append_tokens=append_tokens, generate_next_token=generate_next_token, **kept)


@pytest.mark.parametrize("right", [0, 1, 9, NEW_TOKENS])
def test_what_a_pass_confirms_saves_generation_and_changes_no_token(fp32, right):
    model = WatchedModel(fp32, threads=1, all_positions=True)
    _, prompt = model.render(ROWS[1]["messages"])
    answer, ended = model.answer_and_end(prompt, NEW_TOKENS)
    assert (len(answer), ended, model.generated) == (NEW_TOKENS, False, NEW_TOKENS)
    wrong = [(token + 1) % 512 for token in answer[right:]]
    confirmed = model.follow(prompt, answer[:right] + wrong)
    assert min(right, 4) <= len(confirmed.token_ids) <= right  # some are near ties
    assert model.answer_and_end(prompt, NEW_TOKENS, confirmed=confirmed) == (answer, False)
    assert model.generated == 2 * NEW_TOKENS - len(confirmed.token_ids)


def test_an_answer_is_confirmed_with_its_end_token(fp32):
    model = WatchedModel(fp32, threads=1, all_positions=True)
    _, prompt = model.render(ROWS[1]["messages"])
    answer = model.answer(prompt, NEW_TOKENS)
    last = next(index for index, token in enumerate(answer) if index > 1 and token not in answer[:index])
    model.end_token_ids = {answer[last]}
    for expected, ended in ((answer[: last + 1], True), (answer[:last], False)):
        confirmed = model.follow(prompt, expected)
        assert (confirmed.token_ids, confirmed.ended) == (tuple(answer[:last]), ended)
    model.generated = 0
    confirmed = runtime.Confirmed(tuple(answer[:last]), ended=True)
    assert model.answer_and_end(prompt, NEW_TOKENS, confirmed=confirmed) == (answer[:last], True)
    assert model.generated == 0


def test_a_near_tie_is_generated(fp32, tmp_path):
    model = runtime.GenaiModel(
        with_weights_set(fp32, tmp_path / "uniform", "lm_head", 0.0), threads=1, all_positions=True
    )
    answer = model.answer([5, 6], 4)
    assert model.follow([5, 6], answer).token_ids == ()


def test_one_pass_over_a_row_confirms_its_answer_and_compares_its_distributions(fp32, reference_dir, monkeypatch):
    monkeypatch.setattr("slmops.infra.genai.evaluation.GENERATED_ROWS", 1)
    opened = []
    monkeypatch.setattr(
        "slmops.infra.genai.evaluation.GenaiModel",
        lambda *given, **options: opened.append(WatchedModel(*given, **options)) or opened[-1],
    )
    result = run_evaluate(fp32, reference_dir)
    assert (result["identical_answers"], result["positions"]) == (1.0, 60)
    (model,) = opened
    rows = json.loads((reference_dir / "reference.json").read_bytes())["rows"]
    followed = [len(row["prompt_ids"] + row["answer_ids"]) - 1 for row in rows]
    assert [tokens for tokens in model.passes if tokens in followed] == followed
    assert model.generated < len(rows) * NEW_TOKENS


def test_a_model_that_generates_other_tokens_than_a_pass_confirms_gets_no_drafts(fp32, reference_dir, monkeypatch):
    monkeypatch.setattr("slmops.infra.genai.evaluation.GENERATED_ROWS", 1)
    begun = []

    def broken(model, prompt_ids, budget, counter, confirmed):
        begun.append(confirmed.token_ids)
        return [7, 7], False

    monkeypatch.setattr(runtime.GenaiModel, "answer_and_end", broken)
    assert run_evaluate(fp32, reference_dir)["identical_answers"] == 0.0
    assert begun == [()] * len(ROWS)


@pytest.mark.parametrize("tokens", [1, 7])
def test_chunks_do_not_change_the_figures(fp32, reference_dir, tokens):
    whole = run_evaluate(fp32, reference_dir)
    chunked = run_evaluate(fp32, reference_dir, chunk_bytes=tokens * 4 * whole["vocabulary"]["variant"])
    assert chunked["positions"] == whole["positions"]
    assert chunked["top1_agreement"] == 1.0
    assert chunked["kl_divergence"] < 1e-6


def test_a_model_that_gives_only_the_last_logits_is_compared_at_every_position(work, checkpoint, reference_dir):
    pruned = with_a_slice(build_genai_model(checkpoint, work / "pruned", prune_lm_head=True))
    result = run_evaluate(pruned, reference_dir)
    assert result["positions"] == 60
    assert result["top1_agreement"] == 1.0
    assert result["kl_divergence"] < 1e-6


def test_a_repetition_penalty_gives_the_answers_of_transformers_and_leaves_the_distributions_alone(
    work, checkpoint, fp32, reference_dir
):
    run_reference(checkpoint, work / "penalized", decoding={"repetition_penalty": 1.3})
    result = run_evaluate(fp32, work / "penalized", decoding={"repetition_penalty": 1.3})
    assert result["identical_answers"] == 1.0
    assert result["kl_divergence"] < 1e-6
    plain = run_evaluate(fp32, reference_dir)
    assert [row["answer"] for row in result["rows"]] != [row["answer"] for row in plain["rows"]]


def test_thoughts_are_kept_apart_by_both_runtimes_and_have_tokens_of_their_own(work, checkpoint, fp32, reference_dir):
    plain = run_evaluate(fp32, reference_dir)["rows"]
    end = plain[0]["answer"][8:10]
    marks = {"start": "<|im_start|>assistant\n", "end": end}
    decoding = {"thinking": {"marks": marks, "max_tokens": 16}}
    limits = {"max_new_tokens": 4, "decoding": decoding}
    reference = run_reference(checkpoint, work / "thinking", **limits)["rows"]
    found = run_evaluate(fp32, work / "thinking", **limits)["rows"]
    assert {row["identical_to_reference"] for row in found} == {True}
    for figure in ("tokens", "ended"):
        assert [row["reference_thoughts"][figure] for row in found] == [row["thoughts"][figure] for row in found]
    assert found[0]["reference_answer"].replace("\ufffd", "") == found[0]["answer"]
    thoughtful = found[0]["thoughts"]
    assert thoughtful["ended"]
    assert len(reference[0]["answer_ids"]) == thoughtful["tokens"] + 4
    assert plain[0]["answer"].startswith(plain[0]["answer"][:8].strip() + end + found[0]["answer"])
    endless = [row for row in found if not row["thoughts"]["ended"]]
    assert endless
    assert {(row["answer"], row["thoughts"]["tokens"], row["ended"]) for row in endless} == {("", 16, False)}


def test_a_mode_of_the_template_is_set_before_it_in_both_runtimes(work, checkpoint, fp32, tmp_path):
    for folder in (checkpoint, fp32):
        shutil.copytree(folder, tmp_path / folder.name)
        template = tmp_path / folder.name / "chat_template.jinja"
        template.write_text(f"{{% if short %}}Be brief.{{% endif %}}{template.read_text('utf-8')}", "utf-8")
    rows = [ROWS[0], {**ROWS[1], "template_prefix": "{%- set short = true -%}"}]
    reference = run_reference(tmp_path / checkpoint.name, work / "switched", rows)["rows"]
    found = run_evaluate(tmp_path / fp32.name, work / "switched", rows=rows)["rows"]
    assert [row["prompt"].startswith("Be brief.") for row in reference] == [False, True]
    assert [row["template_matches"] for row in found] == [True, True]


def test_a_variant_that_does_not_end_by_its_source_s_tokens_is_rejected_for_running_on(
    work, checkpoint, fp32, tmp_path
):
    plain = run_reference(checkpoint, work / "running-on")
    ends = sorted({row["answer_ids"][3] for row in plain["rows"]})
    run_reference(checkpoint, work / "ending", decoding={"end_token_ids": ends})
    ending = shutil.copytree(fp32, tmp_path / "ending")
    change_genai_config(ending, lambda config: config["model"].update(eos_token_id=ends))
    for model, rejected in ((ending, []), (fp32, ["ended_answers"])):
        result = run_evaluate(model, work / "ending")
        assert {(row["reference_ended"], row["ended"]) for row in result["rows"]} == {(True, not rejected)}
        found = Evaluation(**result, rows_sha256="", wall_s=1.0, peak_rss_bytes=1)
        verdict = judge(found, thresholds_for("fp16", GateSettings()))
        assert [check.name for check in verdict.failed_checks] == rejected


def test_quantization_shows_in_the_divergence(work, checkpoint, reference_dir):
    result = run_evaluate(build_genai_model(checkpoint, work / "int4", "int4"), reference_dir)
    assert result["finite_logits"] == 1.0
    assert result["kl_divergence"] > 1e-4


def test_a_zeroed_weight_shows_in_agreement_and_divergence(fp32, reference_dir, tmp_path):
    sabotaged = with_weights_set(fp32, tmp_path / "zeroed", "layers.0.mlp.down_proj", 0.0)
    result = run_evaluate(sabotaged, reference_dir)
    assert result["finite_logits"] == 1.0
    assert result["top1_agreement"] < 0.9
    assert result["kl_divergence"] > 0.1


def test_weights_that_are_not_numbers_leave_no_figures(fp32, reference_dir, tmp_path):
    sabotaged = with_weights_set(fp32, tmp_path / "nan", "layers.1.attn.o_proj", float("nan"))
    result = run_evaluate(sabotaged, reference_dir)
    assert result["finite_logits"] == 0.0
    assert result["top1_agreement"] == 0.0
    assert result["kl_divergence"] is None
    assert result["perplexity"] is None
    assert run_evaluate(sabotaged, None)["finite_logits"] == 0.0
    json.dumps(result, allow_nan=False)
    with pytest.raises(StageFailed, check=coded("logits-not-finite")):
        call = Generate(model_dir=sabotaged, messages=ROWS[0]["messages"], max_new_tokens=4, threads=1)
        runtime.generate(call, ignore_progress)


def test_without_a_reference_only_the_variant_itself_is_looked_at(fp32):
    result = run_evaluate(fp32, None, max_positions=10)
    assert (result["positions"], result["finite_logits"]) == (10, 1.0)
    assert result["top1_agreement"] is None
    assert result["kl_divergence"] is None
    assert result["vocabulary"]["reference"] is None


def test_answers_are_greedy_whatever_the_folder_asks_for(damaged, fp32, reference_dir):
    def ask_for_sampling(config):
        config["search"].update(do_sample=True, temperature=3.0, repetition_penalty=1.8, min_length=90, chunk_size=5)

    change_genai_config(damaged, ask_for_sampling)
    sampled, plain = run_evaluate(damaged, reference_dir), run_evaluate(fp32, reference_dir)
    assert [row["answer"] for row in sampled["rows"]] == [row["answer"] for row in plain["rows"]]
    assert sampled["identical_answers"] == 1.0
    assert sampled["top1_agreement"] == 1.0


def test_expected_answers_are_scored(fp32):
    answer = run_evaluate(fp32, None)["rows"][0]["answer"]
    rows = [{**ROWS[0], "expected": f"\n{answer} "}, {**ROWS[1], "expected": "never said"}, ROWS[2]]
    result = run_evaluate(fp32, None, rows=rows)
    assert [row["exact_match"] for row in result["rows"]] == [True, False, None]
    assert result["exact_match"] == 0.5


def test_a_prompt_that_the_runtime_renders_differently_is_reported(damaged, reference_dir):
    template = (damaged / "chat_template.jinja").read_text()
    (damaged / "chat_template.jinja").write_text(template.replace("<|im_end|>\n", "<|im_end|>"))
    mismatches = run_evaluate(damaged, reference_dir)["template_mismatches"]
    assert mismatches["count"] == len(ROWS)
    assert mismatches["example"]["id"] == 1
    assert "please.<|im_end|>\n<|im_start|>assistant" in mismatches["example"]["reference"]
    assert "please.<|im_end|><|im_start|>assistant" in mismatches["example"]["variant"]
    assert mismatches["example"]["reference_ids"] != mismatches["example"]["variant_ids"]


def test_a_padded_vocabulary_is_compared_without_the_padding(fp32, work):
    run_reference(make_tiny_checkpoint(work / "padded", vocab_size=544), work / "padded-reference")
    result = run_evaluate(fp32, work / "padded-reference")
    assert result["vocabulary"] == {"variant": 512, "reference": 544, "compared": 512, "comparable": True}
    assert result["kl_divergence"] > 0


def test_a_vocabulary_of_another_model_is_reported_and_not_compared(fp32, work, tmp_path):
    run_reference(make_tiny_checkpoint(tmp_path / "padded", vocab_size=544), tmp_path / "reference")
    path = tmp_path / "reference" / "reference.json"
    content = json.loads(path.read_text()) | {"tokenizer_size": 530}
    content["rows"][0]["answer_ids"][3] = 529  # no token of the variant
    path.write_text(json.dumps(content))
    result = run_evaluate(fp32, tmp_path / "reference")
    assert result["vocabulary"] == {"variant": 512, "reference": 544, "compared": 0, "comparable": False}
    figures = ("top1_agreement", "kl_divergence", "kl_divergence_p99", "perplexity", "reference_perplexity")
    assert [result[name] for name in figures] == [None] * 5
    assert (result["positions"], result["finite_logits"]) == (60, 1.0)
    alone = run_evaluate(fp32, None)
    assert [row["answer"] for row in result["rows"]] == [row["answer"] for row in alone["rows"]]


def test_a_model_with_a_truncated_vocabulary_is_reported_though_it_cannot_run(damaged, reference_dir):
    change_genai_config(damaged, lambda config: config["model"].update(vocab_size=400))
    result = run_evaluate(damaged, reference_dir)
    assert result["vocabulary"] == {"variant": 400, "reference": 512, "compared": 0, "comparable": False}
    assert (result["positions"], result["finite_logits"], result["empty_answers"]) == (0, 0.0, len(ROWS))
    assert all(row["template_matches"] for row in result["rows"])
    json.dumps(result, allow_nan=False)
    with pytest.raises(StageFailed, check=coded("model-does-not-run")):
        run_evaluate(damaged, None)


def test_a_reference_of_other_rows_is_refused(fp32, reference_dir):
    with pytest.raises(StageFailed, check=coded("reference-of-other-rows")):
        run_evaluate(fp32, reference_dir, rows=ROWS[:2])


def break_config(folder):
    (folder / "genai_config.json").write_text('{"model": {')


def drop_weights(folder):
    (folder / "model.onnx.data").unlink()


def drop_model(folder):
    (folder / "model.onnx").unlink()


def drop_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def drop_template(folder):
    (folder / "chat_template.jinja").unlink()


def rename_type(folder):
    change_genai_config(folder, lambda config: config["model"].update(type="unheard-of"))


def drop_context_length(folder):
    change_genai_config(folder, lambda config: config["model"].pop("context_length"))


def use_unknown_operator(folder):
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[3].op_type = "NoSuchOperator"
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("damage", "code", "named"),
    [
        (break_config, "genai-config-not-valid", "genai_config.json"),
        (drop_context_length, "genai-config-not-valid", "context_length"),
        (drop_weights, "model-does-not-open", "model.onnx.data"),
        (drop_model, "model-does-not-open", "model.onnx"),
        (drop_tokenizer, "model-does-not-open", "tokenizer.json"),
        (drop_template, "chat-template-does-not-render", "chat template"),
        (rename_type, "model-does-not-open", "unheard-of"),
        (use_unknown_operator, "model-does-not-open", "NoSuchOperator"),
    ],
)
def test_a_damaged_folder_is_a_clear_error(damaged, damage, code, named):
    damage(damaged)
    with pytest.raises(StageFailed, check=coded(code, named)) as caught:
        run_evaluate(damaged, None)
    assert caught.value.what_to_do
    assert "\n" not in caught.value.message


def test_answers_that_are_all_empty_are_counted_and_still_compared(damaged):
    change_genai_config(damaged, lambda config: config["model"].update(eos_token_id=list(range(512))))
    result = run_evaluate(damaged, None)
    assert result["empty_answers"] == len(ROWS)
    assert result["positions"] == 60 < sum(row["prompt_tokens"] for row in result["rows"])
    assert result["finite_logits"] == 1.0


def test_an_execution_provider_that_is_not_there_is_a_clear_error(fp32, tmp_path):
    other = shutil.copytree(fp32, tmp_path / "cuda")
    options = {"provider_options": [{"cuda": {}}]}
    change_genai_config(other, lambda config: config["model"]["decoder"]["session_options"].update(options))
    with pytest.raises(StageFailed, check=coded("model-does-not-open")):
        run_evaluate(other, None)


def test_generate_gives_the_evaluation_s_answer(fp32):
    request = {"model_dir": str(fp32), "messages": ROWS[0]["messages"], "max_new_tokens": NEW_TOKENS, "threads": 1}
    result = runtime.generate(Generate(**request), ignore_progress).model_dump(mode="json")
    assert result["answer"] == run_evaluate(fp32, None)["rows"][0]["answer"]
    assert result["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert result["new_tokens"] <= NEW_TOKENS
    assert result["finish"] == ("length" if result["new_tokens"] == NEW_TOKENS else "stop")


def test_generate_stops_at_any_of_the_end_tokens(damaged):
    change_genai_config(damaged, lambda config: config["model"].update(eos_token_id=list(range(512))))
    request = {"model_dir": str(damaged), "messages": ROWS[0]["messages"], "max_new_tokens": 5, "threads": 1}
    result = runtime.generate(Generate(**request), ignore_progress).model_dump(mode="json")
    assert (result["answer"], result["new_tokens"], result["finish"]) == ("", 0, "stop")
