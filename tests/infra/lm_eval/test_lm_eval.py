import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.lm_eval import run
from slmops.infra.lm_eval.calls import RunTasks
from slmops.infra.lm_eval.task_files import check_task_folder, digest_of_task_folder
from slmops.infra.process.channel import child_environment
from tests.support.checkpoints import SENTENCES, make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model, with_weights_set
from tests.support.lm_eval_tasks import GENERATION, MULTIPLE_CHOICE, QUESTIONS, add_begin_token, write_tasks

BEGIN = "<|begin_of_text|>"
CONTEXT = 96
STRACE = ["strace", "-f", "-e", "trace=connect,sendto,sendmsg,sendmmsg,openat", "-o"]


def ignore_progress(done, total, what):
    assert 0 <= done <= total
    assert what


def only_plain_words(checkpoint):
    """Give every token that is not plain text the logit 0, which is never the largest: bytes of no character and
    control tokens are decoded otherwise in a stream than as a whole."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    for token in range(weights["lm_head.weight"].shape[0]):
        text = tokenizer.decode([token])
        if token in tokenizer.added_tokens_decoder or not (text and text.isprintable() and text.isascii()):
            weights["lm_head.weight"][token] = 0
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


@pytest.fixture(scope="module", params=["qwen2", "llama with begin token"])
def pair(request, tmp_path_factory):
    """lm-eval's own runner on a float32 checkpoint, and slmops's runner on its fp32 build."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slmops.infra.lm_eval.model import GenaiLM

    work = tmp_path_factory.mktemp("pair")
    sizes = {"tied": False, "max_position_embeddings": CONTEXT}
    if request.param == "qwen2":
        checkpoint = make_tiny_checkpoint(work / "checkpoint", **sizes)
    else:
        made = make_tiny_checkpoint(work / "checkpoint", family="llama", chat_template="llama3", **sizes)
        checkpoint = add_begin_token(made, BEGIN)
    only_plain_words(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=1)
    folder = build_genai_model(checkpoint, work / "model")
    return theirs, GenaiLM(GenaiModel(folder, threads=2), ignore_progress)


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def test_the_special_tokens_are_those_of_lm_evals_own_runner(pair):
    theirs, ours = pair
    assert (ours.eot_token_id, ours.prefix_token_id, ours.max_length) == (
        theirs.eot_token_id,
        theirs.prefix_token_id,
        theirs.max_length,
    )
    for text in ("Turn on the lights", "", f"{BEGIN}Turn on", "東京 naïve"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)


def test_log_likelihoods_are_those_of_lm_evals_own_runner(pair):
    theirs, ours = pair
    asked = [(question["question"], f" {choice}") for question in QUESTIONS for choice in question["choices"]]
    first = [(question["question"], {"until": [], "max_gen_toks": 1}) for question in QUESTIONS]
    greedy = theirs.generate_until(instances("generate_until", *first))
    asked += [(question, answer) for (question, _), answer in zip(first, greedy, strict=True)]
    asked += [("", "Paris"), ("Ends in space ", "fox"), (" ".join(SENTENCES), " Paris")]
    asked += [(asked[0][0], " a"), (asked[0][0], " b"), (asked[0][0] + " a", " b")]
    expected = theirs.loglikelihood(instances("loglikelihood", *asked))
    found = ours.loglikelihood(instances("loglikelihood", *asked))
    np.testing.assert_allclose([answer[0] for answer in found], [value[0] for value in expected], atol=2e-3)
    assert [answer[1] for answer in found] == [value[1] for value in expected]
    assert {answer[1] for answer in found} == {True, False}
    assert any("were cut at the beginning" in note for note in ours.notes)


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_runner(pair):
    theirs, ours = pair
    texts = [("Paris",), (SENTENCES[0],), ("\n".join(SENTENCES * 3),), ("",)]
    asked = instances("loglikelihood_rolling", *texts)
    assert len(ours.tok_encode(texts[2][0])) > 3 * CONTEXT
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked), rtol=1e-4)


def test_answers_are_those_of_lm_evals_own_runner(pair):
    theirs, ours = pair
    plain = [
        (question["question"], {"until": until, "max_gen_toks": 12, "do_sample": False})
        for question in QUESTIONS
        for until in ([], ["e"], ["\n", " the"], ["<|im_end|>"])
    ]
    plain.append((" ".join(SENTENCES), {"until": ["."], "max_gen_toks": 5}))
    expected = theirs.generate_until(instances("generate_until", *plain))
    found = ours.generate_until(instances("generate_until", *plain))
    assert found == expected
    assert len(set(found)) > len(QUESTIONS)  # stop sequences were met


def test_chats_are_rendered_as_by_lm_evals_own_runner(pair):
    theirs, ours = pair
    chat = [{"role": "user", "content": "Turn on the lights."}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    begun = [*chat, {"role": "assistant", "content": "The answer is"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == theirs.apply_chat_template(
        begun, add_generation_prompt=False
    )


def test_requests_that_the_model_cannot_take_are_named(pair):
    _, ours = pair
    with pytest.raises(BadInput, check=coded("lm-eval-too-long")):
        ours.loglikelihood(instances("loglikelihood", ("Turn", " ".join(SENTENCES))))
    with pytest.raises(BadInput, check=coded("lm-eval-answer-too-long", f"{CONTEXT} tokens")):
        ours.generate_until(instances("generate_until", ("Turn", {"until": [], "max_gen_toks": CONTEXT})))


def test_logits_that_are_not_finite_are_named(pair, tmp_path):
    broken = with_weights_set(pair[1]._model.model_dir, tmp_path / "broken", "final_norm", float("nan"))
    ours = type(pair[1])(GenaiModel(broken, threads=2), ignore_progress)
    with pytest.raises(StageFailed, check=coded("logits-not-finite")):
        ours.loglikelihood(instances("loglikelihood", ("Turn", " on")))


# ---- the folder of the user's tasks

CODE = {
    "function": "task: x\nprocess_docs: !function mine.process\n",
    "nested": "group: x\ntask:\n  - task: y\n    doc_to_text: !function mine.text\n",
    "python": "task: !!python/object/apply:os.system ['true']\n",
    "other tag": "task: !anything x\n",
    "pickle": "task: x\ndataset_path: pandas\ndataset_kwargs: {data_files: a.pkl}\n",
    "nested pickle": "group: x\ntask:\n  - {task: y, dataset_path: pandas}\n",
}


@pytest.mark.parametrize("content", CODE.values(), ids=CODE)
def test_a_task_file_that_asks_for_code_is_refused_unless_allowed(tmp_path, content):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "task.yaml").write_text(content)
    with pytest.raises(BadInput, check=lambda error: error.code in ("lm-eval-code", "lm-eval-dataset-not-allowed")):
        check_task_folder(tmp_path, allow_code=False)
    check_task_folder(tmp_path, allow_code=True)


def test_an_included_file_is_checked_in_any_folder_but_lm_evals_own_is_trusted(tmp_path):
    import lm_eval

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "_base").write_text("doc_to_text: !function mine.text\n")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a.yaml").write_text("task: x\ninclude: ../elsewhere/_base\n")
    with pytest.raises(BadInput, check=coded("lm-eval-code")):
        check_task_folder(folder, allow_code=False)
    (folder / "a.yaml").write_text(f"task: x\ninclude: [{elsewhere / 'missing'}]\n")
    with pytest.raises(BadInput, check=coded("lm-eval-file-unreadable")):
        check_task_folder(folder, allow_code=False)
    (folder / "a.yaml").write_text("task: x\ninclude: a.yaml\n")  # itself: no endless loop
    check_task_folder(folder, allow_code=False)
    built_in = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    assert "!function" in built_in.read_text()
    (folder / "a.yaml").write_text(f"task: x\ninclude: {built_in}\n")
    check_task_folder(folder, allow_code=False)


def test_plain_task_files_are_taken(tmp_path):
    check_task_folder(write_tasks(tmp_path), allow_code=False)
    (tmp_path / "more.yaml").write_text(
        "task: x\ndataset_path: owner/name\nmetadata: {version: 1.0, date: 2025-01-01}\nbase: &a {b: 1}\nc: {<<: *a}\n"
    )
    check_task_folder(tmp_path, allow_code=False)


@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_task_file_is_taken_or_refused_in_words(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any-tasks"
    folder.mkdir(exist_ok=True)
    (folder / "any.yaml").write_bytes(content)
    try:
        check_task_folder(folder, allow_code=False)
        digest_of_task_folder(folder)
    except BadInput as error:
        assert error.what_to_do


def test_no_folder_and_no_task_file_are_refused(tmp_path):
    for call in (digest_of_task_folder, lambda folder: check_task_folder(folder, allow_code=False)):
        with pytest.raises(BadInput, check=coded("lm-eval-folder-missing")):
            call(tmp_path / "none")
    with pytest.raises(BadInput, check=coded("lm-eval-folder-empty")):
        check_task_folder(tmp_path, allow_code=False)


def test_the_folders_digest_covers_tasks_and_data_inside_and_outside(tmp_path):
    (tmp_path / "outside.jsonl").write_text("{}")
    folder = write_tasks(tmp_path / "tasks")
    (folder / "out.yaml").write_text(
        "task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: '../out*.jsonl'}}\n"
    )
    seen = [digest_of_task_folder(folder)]
    shutil.copytree(folder, tmp_path / "copy")
    assert digest_of_task_folder(folder) == seen[0]
    for path in (tmp_path / "outside.jsonl", folder / "questions.jsonl", folder / "choice.yaml"):
        path.write_text(path.read_text() + "\n")
        seen.append(digest_of_task_folder(folder))
    (folder / "choice.yaml").rename(folder / "renamed.yaml")
    seen.append(digest_of_task_folder(folder))
    assert len(set(seen)) == 5


# ---- what is refused when tasks are loaded


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Run tasks of a folder with no model; changes to the process are undone."""
    from lm_eval import utils

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.setattr(utils, "env", utils.env)

    def call(name, content=None, **changes):
        folder = write_tasks(tmp_path / "tasks")
        if content is not None:
            (folder / "own.yaml").write_text(content)
        request = {
            "model_dir": str(tmp_path / "no-model"),
            "checkpoint_dir": None,
            "tasks": [name],
            "include_path": str(folder),
            "limit": None,
            "chat_template": False,
            "allow_code": False,
            "allow_network": True,  # the hook that forbids it would stay in this process
            "threads": 1,
        }
        return run.evaluate(RunTasks.model_validate(request | changes), ignore_progress)

    return call


OWN = MULTIPLE_CHOICE.replace("house_choice", "own")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (OWN.replace("{{question}}", "{{ ''.__class__.__mro__ }}"), coded("lm-eval-task-not-valid", "is unsafe")),
        (OWN.replace("{{question}}", "{{nothing}}"), coded("lm-eval-task-not-valid", "'nothing'")),
        (OWN.replace("questions.jsonl", "nowhere.jsonl"), coded("lm-eval-task-not-valid", "nowhere.jsonl")),
        (OWN.replace("metric: acc,", "metric: ./evil,"), coded("lm-eval-metric-unknown", "'./evil'")),
        (OWN.replace("multiple_choice", "no_such_type"), coded("lm-eval-task-not-valid")),
        (OWN.replace("test_split: test", "test_split: dev"), coded("lm-eval-task-not-valid")),
        (
            GENERATION.replace("house_answer", "own").replace("false}", "true, temperature: 0.7}"),
            coded("lm-eval-samples"),
        ),
        ("task: own\nprocess_docs: !function mine.process\n", coded("lm-eval-code")),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(load, tmp_path, content, fault):
    (tmp_path / "tasks" / "evil").mkdir(parents=True)
    (tmp_path / "tasks" / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BadInput, check=fault):
        load("own", content)
    assert not (tmp_path / "ran").exists()


def test_code_runs_where_it_is_allowed(load, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.py").write_text(
        f"def text(doc):\n    open({str(tmp_path / 'ran')!r}, 'w')\n    return 'x'"
    )
    with pytest.raises(StageFailed, check=coded("genai-config-not-valid")):  # as far as the model
        load("own", OWN.replace('"{{question}}"', "!function mine.text"), allow_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_close_names(load, monkeypatch):
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", cache(tasks.TaskManager))  # whose built-in index takes seconds
    with pytest.raises(BadInput) as caught:
        load("house_choise")
    assert "no task 'house_choise'" in caught.value.message
    assert "house_choice" in caught.value.what_to_do
    with pytest.raises(BadInput) as caught:
        load("helaswag")
    assert "hellaswag" in caught.value.what_to_do
    with pytest.raises(BadInput, check=coded("lm-eval-task-unknown")):  # a file outside the folder is no name
        load("tasks/choice.yaml")


def test_without_lm_eval_the_extra_is_named(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BadInput) as caught:
        load("own", OWN)
    assert "pip install 'slmops[lm-eval]'" in caught.value.what_to_do


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace (from the system's package manager) is missing")
@pytest.mark.slow
@pytest.mark.parametrize("pair", ["qwen2"], indirect=True)
@pytest.mark.parametrize("data", ["questions.jsonl", "https://example.com/questions.jsonl", "http://192.0.2.1/q.jsonl"])
def test_nothing_leaves_the_machine(pair, tmp_path, data):
    folder = write_tasks(tmp_path / "tasks")
    (folder / "choice.yaml").write_text(MULTIPLE_CHOICE.replace("questions.jsonl", data))
    request = {
        "model_dir": str(pair[1]._model.model_dir),
        "checkpoint_dir": None,
        "tasks": ["house_choice"],
        "include_path": str(folder),
        "limit": 2,
        "chat_template": False,
        "allow_code": False,
        "allow_network": False,
        "threads": 1,
    }
    trace = tmp_path / "trace.txt"
    environment = child_environment({**run.OFFLINE, "HOME": str(tmp_path / "empty-home")})
    child = subprocess.Popen(
        [*STRACE, str(trace), sys.executable, "-m", "slmops.infra.process.child", RunTasks.target()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env=environment | {"CI": "1"},
    )
    call = {
        "call": RunTasks.target(),
        "request": request,
        "log_path": os.devnull,
        "work_dir": str(tmp_path),
        "is_last": True,
    }
    child.stdin.write(json.dumps(call).encode() + b"\n")
    child.stdin.flush()
    last = json.loads(child.stdout.readlines()[-1])
    child.stdin.close()
    child.stdout.close()
    child.wait(60)
    assert ("result" in last) == (data == "questions.jsonl"), last
    lines = trace.read_text().splitlines()
    assert len(lines) > 1000
    assert not [line for line in lines if "AF_INET" in line and "127.0.0.1" not in line and "::1" not in line]
    assert not [line for line in lines if "resolv.conf" in line]
