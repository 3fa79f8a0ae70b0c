import json
import os
import shutil
from datetime import datetime

import pytest

from slmops.infra.errors import StageFailed
from slmops.infra.genai.calls import RenderChats
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.transformers.calls import RenderConversations
from tests.support.errors import coded
from tests.support.family_tokenizers import FAMILIES, save_tokenizer

ASKING = [{"role": "user", "content": "What is the capital of France?"}]
WITH_SYSTEM = [{"role": "system", "content": "You answer with JSON."}, *ASKING]
DATED = "{{ bos_token }}{% if messages[0].role == 'system' %}{{ strftime_now('%d %b %Y') }}{% endif %} hello <|x|>"
GENAI_CONFIG = {"model": {"type": "llama", "context_length": 64, "vocab_size": 512}, "search": {}}


@pytest.fixture
def tokenizer_dir(tmp_path):
    """A Llama 3 tokenizer as a genai folder without a model."""
    folder = save_tokenizer(tmp_path / "tokenizer", FAMILIES["llama-3"])
    (folder / "genai_config.json").write_text(json.dumps(GENAI_CONFIG), "utf-8")
    return folder


@pytest.fixture
def run(tmp_path):
    def ask(call, environment=None):
        answer = run_in_child(
            call,
            deadline_s=120,
            log_path=tmp_path / "child.log",
            work_dir=tmp_path / "work",
            environment=environment,
        ).value
        return answer.model_dump(mode="json")

    return ask


@pytest.fixture
def transformers(run, tokenizer_dir):
    def ask(conversations, folder=tokenizer_dir, **request):
        defaults = {"moments": {}, "marks": r"<\|\w+\|>", "context": ["a ", " b"]}
        return run(RenderConversations(tokenizer_dir=folder, conversations=conversations, **{**defaults, **request}))

    return ask


@pytest.fixture
def genai(run, tokenizer_dir):
    def ask(conversations, environment=None, **request):
        defaults = {"control_tokens": [], "context": ["a ", " b"], "compositions": {}}
        call = RenderChats(model_dir=tokenizer_dir, conversations=conversations, **{**defaults, **request})
        return run(call, environment)

    return ask


def test_transformers_and_genai_render_and_tokenize_alike_without_a_model(transformers, genai):
    conversations = {"plain": ASKING, "system": WITH_SYSTEM}
    expected = transformers(conversations)
    tokens = expected["control_tokens"]
    assert sorted(tokens) == ["<|begin_of_text|>", "<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"]
    found = genai(conversations, control_tokens=list(tokens), compositions={"bare": "hello"})
    for name in conversations:
        (rendering,) = expected["conversations"][name]["renderings"]
        assert {key: found["conversations"][name][key] for key in ("text", "ids")} == {
            key: rendering[key] for key in ("text", "ids")
        }
        assert rendering["text"].startswith(expected["begin_token"])
    for text, token in tokens.items():
        assert found["control_tokens"][text]["alone"] == token["alone"] == [token["id"]]
        assert found["control_tokens"][text]["in_context"].count(token["id"]) == 1
    assert found["compositions"]["bare"][0] == tokens["<|begin_of_text|>"]["id"]
    assert (found["fault"], expected["dated"], expected["marks"]) == (None, False, {})
    assert set(expected["versions"]) | set(found["versions"]) == {"transformers", "tokenizers", "onnxruntime-genai"}


def test_transformers_renders_a_dated_template_at_given_moments(transformers, tokenizer_dir):
    (tokenizer_dir / "chat_template.jinja").write_text(DATED, "utf-8")
    midnight = ["2026-02-28T23:59:59.9", "2026-03-01T00:00:00.1"]
    conversations = {"plain": ASKING, "system": WITH_SYSTEM}
    rendered = transformers(conversations, moments={"plain": midnight, "system": midnight})
    texts = {
        name: [rendering["text"] for rendering in found["renderings"]]
        for name, found in rendered["conversations"].items()
    }
    begin = "<|begin_of_text|>"
    assert texts == {
        "plain": [f"{begin} hello <|x|>"],
        "system": [f"{begin}28 Feb 2026 hello <|x|>", f"{begin}01 Mar 2026 hello <|x|>"],
    }
    assert rendered["dated"] is True
    assert rendered["marks"] == {"<|x|>": 5}
    before = datetime.now()
    (today,) = transformers({"system": WITH_SYSTEM})["conversations"]["system"]["renderings"]
    days = [f"{moment:%d %b %Y}" for moment in (before, datetime.now())]
    assert today["text"][len(begin) : -12] in days


@pytest.mark.parametrize("zone", [None, "Asia/Tokyo"])
def test_genai_writes_the_local_time_of_its_moments(genai, tokenizer_dir, zone):
    if zone and os.name != "posix":
        pytest.skip("Windows has no time zone per process")
    (tokenizer_dir / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}", "utf-8")
    found = genai({"plain": ASKING}, environment={"TZ": zone} if zone else None)["conversations"]["plain"]
    before, after = found["moments"]
    assert before[:19] <= found["text"] <= after[:19]


def test_what_a_template_refuses_is_reported_by_conversation(transformers, genai, tokenizer_dir):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}hi"
    (tokenizer_dir / "chat_template.jinja").write_text(refusing, "utf-8")
    conversations = {"plain": ASKING, "system": WITH_SYSTEM}
    expected, found = transformers(conversations)["conversations"], genai(conversations)["conversations"]
    assert expected["system"] == {"renderings": [], "refusal": "No system"}
    assert found["system"]["error"].startswith("No system.")
    assert found["plain"]["text"] == expected["plain"]["renderings"][0]["text"] == "hi"


def test_a_tokenizer_that_does_not_open(transformers, genai, tokenizer_dir, tmp_path):
    damaged = shutil.copytree(tokenizer_dir, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("[]", "utf-8")
    with pytest.raises(StageFailed, check=coded("tokenizer-does-not-load")):
        transformers({"plain": ASKING}, folder=damaged)
    (tokenizer_dir / "tokenizer.json").write_text("[]", "utf-8")
    found = genai({"plain": ASKING})
    assert found["fault"]
    assert found["conversations"] == {}
