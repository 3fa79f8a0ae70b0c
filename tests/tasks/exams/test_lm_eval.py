import math

import numpy as np
import pytest
from scipy import special

from slmops.infra.errors import BadInput
from slmops.infra.storage.manifest import digest_of
from slmops.infra.storage.opening import open_registry
from slmops.tasks.exams import lm_eval as benchmarks
from slmops.tasks.exams.exam import Bench, examine
from slmops.tasks.exams.lm_eval import (
    LmEvalExam,
    LmEvalTasks,
    lm_eval_question,
    run_lm_eval_on_checkpoint,
    run_lm_eval_tasks,
)
from slmops.tasks.workshop import Workshop, working_in
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model
from tests.support.lm_eval_tasks import QUESTIONS, write_tasks
from tests.support.versions import evidence
from tests.tasks.exams.test_text import store

NAMES = ("house_choice", "house_answer", "house_text")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def checkpoint(work):
    return make_tiny_checkpoint(work / "checkpoint", tied=False)


@pytest.fixture(scope="module")
def model_dir(work, checkpoint):
    return build_genai_model(checkpoint, work / "fp32")


def own_figures(checkpoint):
    """Accuracy, bytes-normalized accuracy and bits per byte by a plain forward pass for every answer and text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def likelihood(context, continuation):
        ids = context + continuation
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
        scores = special.log_softmax(logits, axis=-1)
        return sum(scores[place - 1, ids[place]] for place in range(len(context), len(ids)))

    right, right_by_length, total, size = 0, 0, 0.0, 0
    for row in QUESTIONS:
        question = tokenizer(row["question"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            scores.append(likelihood(question, whole[len(question) :]))
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right += int(np.argmax(scores)) == row["answer"]
        right_by_length += int(np.argmax(by_length)) == row["answer"]
        total += likelihood([tokenizer.eos_token_id], question)
        size += len(row["question"].encode())
    return {
        ("house_choice", "acc"): right / len(QUESTIONS),
        ("house_choice", "acc_norm"): right_by_length / len(QUESTIONS),
        ("house_text", "bits_per_byte"): -total / size / math.log(2),
    }


def test_a_variant_and_its_checkpoint_have_the_figures_of_plain_forward_passes(
    checkpoint, model_dir, work, settings, tmp_path
):
    asked = LmEvalTasks(names=NAMES, include_path=str(work / "tasks"))
    variant = run_lm_eval_tasks(settings, asked, Bench(model_dir, tmp_path / "variant"))
    source = run_lm_eval_tasks(settings, asked, Bench(checkpoint, tmp_path / "source"), checkpoint=True)
    figures = {(result.task, result.metric): result.value for result in variant}
    assert set(figures) == {*own_figures(checkpoint), ("house_answer", "exact_match")}
    assert figures == pytest.approx({(result.task, result.metric): result.value for result in source}, rel=1e-4)
    assert {key: figures[key] for key in own_figures(checkpoint)} == pytest.approx(own_figures(checkpoint), rel=1e-4)
    by_name = {(result.task, result.metric): result for result in variant}
    accuracy = by_name["house_choice", "acc"]
    assert (accuracy.n_samples, accuracy.higher_is_better, accuracy.filter) == (len(QUESTIONS), True, "none")
    assert (accuracy.task_version, accuracy.num_fewshot) == ("2.0", 0)
    share = accuracy.value  # the standard error of a mean of zeros and ones
    assert accuracy.stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(QUESTIONS) - 1)))
    assert by_name["house_text", "bits_per_byte"].higher_is_better is False
    assert by_name["house_text", "bits_per_byte"].stderr is None
    assert set(accuracy.versions) == {"lm-eval", "datasets", "onnxruntime", "onnxruntime-genai"}
    assert [result.task_digest for result in variant] == [result.task_digest for result in source]
    assert len({result.task_digest for result in variant}) == 3


def test_results_are_evidence_and_the_same_question_is_asked_once(
    checkpoint, model_dir, work, settings, tmp_path, monkeypatch
):
    registry = open_registry(settings)
    manifest, prepared = store(registry, checkpoint, {"fp16": model_dir})
    variant = manifest.variants[0]
    folder = write_tasks(tmp_path / "tasks")
    asked = LmEvalTasks(names=("house_choice",), include_path=str(folder), limit=2)

    def on_variant():
        with working_in(Workshop(settings, registry)):
            return examine.fn(LmEvalExam(asked), registry.of(manifest).variant(variant.precision))

    def on_checkpoint():
        with working_in(Workshop(settings, registry)):
            return run_lm_eval_on_checkpoint.fn(registry.of(manifest), prepared, asked)

    found = on_variant()
    assert {result.n_samples for result in found} == {2}
    reference = on_checkpoint()
    assert [result.value for result in reference] == [result.value for result in found]
    assert [record["subject"] for record in evidence(registry, manifest, "lm-eval")] == ["fp16", "checkpoint"]
    with monkeypatch.context() as patch:
        patch.setattr("slmops.tasks.exams.exam.run_in_child", None)
        assert on_variant() == found
        assert on_checkpoint() == reference
        (folder / "questions.jsonl").write_text((folder / "questions.jsonl").read_text() + "\n")
        with pytest.raises(TypeError):  # other data: it would be run again
            on_variant()
    assert not list((settings.cache_dir / "work").iterdir())


def test_the_key_depends_on_subject_tasks_limit_chat_and_folder(work):
    asked = LmEvalTasks(names=("house_choice",))
    changes = [{}, {"names": NAMES}, {"limit": 3}, {"chat_template": True}, {"include_path": str(work / "tasks")}]
    keys = [digest_of(lm_eval_question("a" * 64, asked.model_copy(update=change))) for change in changes]
    assert len({*keys, digest_of(lm_eval_question("b" * 64, asked))}) == 6
    assert digest_of(lm_eval_question("a" * 64, asked.model_copy(update={"allow_network": True}))) == keys[0]


@pytest.mark.parametrize("changes", [{"names": ()}, {"names": ("",)}, {"limit": 0}, {"limit": -3}])
def test_an_empty_question_is_refused_before_anything_starts(settings, tmp_path, changes):
    asked = LmEvalTasks(**{"names": NAMES} | changes)
    with pytest.raises(BadInput):
        run_lm_eval_tasks(settings, asked, Bench(tmp_path, tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_without_lm_eval_the_extra_is_named_before_anything_starts(monkeypatch):
    def no_version(package):
        raise benchmarks.PackageNotFoundError(package)

    monkeypatch.setattr(benchmarks, "version_of", no_version)
    with pytest.raises(BadInput, check=coded("lm-eval-missing")) as caught:
        lm_eval_question("a" * 64, LmEvalTasks(names=NAMES))
    assert "pip install 'slmops[lm-eval]'" in caught.value.what_to_do
