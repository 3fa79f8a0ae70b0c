import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foundry.abilities import abilities_of_template
from slmops.infra.foundry.calls import (
    DescribeRuntime,
    ListModels,
    Prove,
    Register,
    Registered,
    Unregister,
    Unregistered,
)
from slmops.infra.foundry.chat import FoundryChat
from slmops.infra.foundry.model_folder import write_model_folder
from slmops.infra.foundry.runtime import check_model_id
from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.process.call import Call, Progress
from slmops.infra.process.channel import QUIET_ENVIRONMENT
from slmops.infra.process.supervisor import run_in_child
from tests.support.checkpoints import BEGIN_AND_END_TOKENS, make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model
from tests.tasks.chat_templates import FAMILIES, TEMPLATES

ROOT = Path(__file__).parents[3]
STRACE = ["strace", "-f", "-e", "trace=network,openat,mkdir,mkdirat", "-o"]
NEW_TOKENS = 12
INT4, INT8 = "home-int4-generic-cpu", "home-int8-generic-cpu"
PLAIN = [{"role": "user", "content": "Turn on the lights in the kitchen, please."}]
TURNS = [
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": 'Hello {x} "quoted"'},
    {"role": "user", "content": "What is\nthe capital? 東京"},
]
WITH_SYSTEM = [{"role": "system", "content": "You answer with JSON."}, *TURNS]

# Another user's program: the SDK alone, knowing nothing but Foundry's directory.
SDK_ALONE = """
import json, sys
from foundry_local_sdk import *
from foundry_local_sdk.catalog import CatalogType
cache_dir, model_id, prompt, own_dir = sys.argv[1:]
FoundryLocalManager.initialize(Configuration(app_name="someone-elses", model_cache_dir=cache_dir, app_data_dir=own_dir))
catalog = FoundryLocalManager.instance.get_catalog(CatalogType.LOCAL)
listed = [variant.id for model in catalog.list_models() for variant in model.variants]
model = catalog.get_model_variant(model_id)
model.load()
def parts(length, **options):
    with ChatSession(model) as session:
        session.set_options(RequestOptions(search=SearchOptions(do_sample=False, max_output_tokens=length), **options))
        with session.process_request(Request().add_item(MessageItem.user(prompt))) as response:
            return [(part.type.name, part.text) for item in response for part in item.parts]
thoughts = {"guidance_type": "lark_grammar", "guidance_data": 'start: "<think>a light</think>on"'}
info = {name: getattr(model.info, name) for name in ("capabilities", "supports_tool_calling", "max_output_tokens")}
answer, thinking = parts(12), parts(48, additional_options=thoughts)
print(json.dumps({"listed": listed, "text": answer, "thinking": thinking, "info": info}))
"""


class AnswerInGenai(Call[dict[str, list[dict[str, Any]]]]):
    conversations: dict[str, list[list[dict[str, str]]]]

    def perform(self, progress: Progress) -> dict[str, list[dict[str, Any]]]:
        answers = {}
        for folder, conversations in self.conversations.items():
            model = GenaiModel(Path(folder), threads=2)
            rendered = [model.render(messages)[1] for messages in conversations]
            answers[folder] = [
                {"prompt_tokens": len(ids), "answer": model.decode(model.answer(ids, NEW_TOKENS))} for ids in rendered
            ]
        return answers


class CountInTransformers(Call[dict[str, list[int]]]):
    conversations: dict[str, list[list[dict[str, str]]]]

    def perform(self, progress: Progress) -> dict[str, list[int]]:
        from transformers import AutoTokenizer

        return {
            folder: [
                len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
                for messages in conversations
            ]
            for folder, conversations in self.conversations.items()
            for tokenizer in [AutoTokenizer.from_pretrained(folder)]
        }


class Foundry:
    """A Foundry cache of the test's own, and child functions run on it."""

    def __init__(self, directory, model_dir):
        self.directory, self.cache_dir, self.model_dir = directory, directory / "foundry", model_dir

    def run(self, kind, **request):
        return run_in_child(
            kind(**request),
            deadline_s=120,
            log_path=self.directory / "child.log",
            work_dir=self.directory / "work",
        ).value

    def ask(self, kind, **request):
        return self.run(kind, cache_dir=self.cache_dir, **request)

    def write(self, precision="int4", version=1, model_dir=None):
        files = {path.name: path for path in (model_dir or self.model_dir).iterdir()}
        name = {"Name": f"home-{precision}-generic-cpu:{version}"}
        return write_model_folder(
            self.cache_dir, "home", precision, version, sources=files, inference_model=name, model_card="# home\n"
        )

    def register(self, model_id, folder, **metadata):
        return self.ask(Register, model_id=model_id, folder=folder, metadata=metadata)

    def ids(self):
        return [model.model_id for model in self.ask(ListModels)]

    def prove(self, model_id, messages=PLAIN, max_new_tokens=NEW_TOKENS):
        return self.ask(Prove, model_id=model_id, messages=messages, max_new_tokens=max_new_tokens)

    def genai(self, messages):
        folder = str(self.model_dir)
        return self.run(AnswerInGenai, conversations={folder: [messages]})[folder][0]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("built")
    return build_genai_model(make_tiny_checkpoint(directory / "checkpoint"), directory / "model")


@pytest.fixture
def foundry(tmp_path, model_dir):
    return Foundry(tmp_path, model_dir)


def test_a_registered_model_answers_another_program_as_genai_does(foundry, tmp_path):
    model_id = f"{INT4}:1"
    folder = foundry.write()
    abilities = abilities_of_template("{{ tools }}<tool_call>{'name': 0, 'arguments': 0}</tool_call></think>", {})
    registered = foundry.register(model_id, folder, **abilities.properties, max_output_tokens=77)
    assert registered == Registered(model_id=model_id, alias="home-int4", folder=str(folder), changed=True)
    expected = foundry.genai(PLAIN)
    assert expected["answer"]

    proof = foundry.prove(model_id)
    assert {key: getattr(proof, key) for key in ("answer", "prompt_tokens")} == expected
    assert (proof.folder, proof.completion_tokens, proof.finish_reason) == (str(folder), NEW_TOKENS, "length")
    assert proof.load_ms > 0 and proof.e2e_latency_ms > 0

    home = tmp_path / "home"
    home.mkdir()
    arguments = [str(foundry.cache_dir), model_id, PLAIN[0]["content"], str(tmp_path / "theirs")]
    done = subprocess.run(
        [sys.executable, "-c", SDK_ALONE, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(home), **QUIET_ENVIRONMENT},
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "listed": [model_id],
        "text": [["DEFAULT", expected["answer"]]],
        "thinking": [["REASONING", "a light"], ["DEFAULT", "on"]],  # by the marks that the registration publishes
        "info": {"capabilities": "tool-calling,reasoning", "supports_tool_calling": True, "max_output_tokens": 77},
    }


def test_variants_versions_and_the_champion_live_side_by_side(foundry):
    folders = {f"{INT4}:1": foundry.write(), f"{INT4}:2": foundry.write(version=2), f"{INT8}:1": foundry.write("int8")}
    for model_id, folder in folders.items():
        assert foundry.register(model_id, folder).changed
    for version in (1, 2):
        assert foundry.register(f"home:{version}", folders[f"{INT4}:{version}"]).alias == "home"
    everything = {**folders, "home:1": folders[f"{INT4}:1"], "home:2": folders[f"{INT4}:2"]}
    models = foundry.ask(ListModels)
    assert {model.model_id: model.folder for model in models} == {key: str(path) for key, path in everything.items()}
    assert all(model.folder_exists and model.context_length == 1024 for model in models)

    assert foundry.ask(Unregister, model_id=f"{INT4}:1") == Unregistered(model_id=f"{INT4}:1", changed=True)
    assert foundry.ask(Unregister, model_id=f"{INT4}:1").changed is False
    assert sorted(foundry.ids()) == sorted(everything.keys() - {f"{INT4}:1"})
    with pytest.raises(
        StageFailed, check=coded("foundry-model-unknown", "home-int4-generic-cpu:1;", ": home-int4-generic-cpu:2")
    ):
        foundry.prove(f"{INT4}:1")


def test_registering_again_changes_nothing_and_another_folder_moves_the_id(foundry):
    first, second = foundry.write(), foundry.write(version=2)
    assert foundry.register("home:1", first).changed is True
    assert foundry.register("home:1", first).changed is False
    assert foundry.register("home:1", second).changed is True
    assert [(model.model_id, model.folder) for model in foundry.ask(ListModels)] == [("home:1", str(second))]


def test_a_missing_and_a_damaged_folder_have_different_errors(foundry):
    folder = foundry.write()
    foundry.register(f"{INT4}:1", folder)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(StageFailed, check=coded("foundry-failed", "home-int4-generic-cpu:1: failed to load model")):
        foundry.prove(f"{INT4}:1")
    (folder / "genai_config.json").unlink()
    (folder / "genai_config.json").write_text("{")
    with pytest.raises(StageFailed, check=coded("foundry-failed", "failed to parse genai_config.json")):
        foundry.prove(f"{INT4}:1")
    shutil.rmtree(folder)
    assert foundry.ask(ListModels)[0].folder_exists is False
    with pytest.raises(StageFailed, check=coded("foundry-failed", "model not found at path")):
        foundry.prove(f"{INT4}:1")
    with pytest.raises(StageFailed, check=coded("genai-config-missing")):
        foundry.register(f"{INT4}:2", folder)
    assert foundry.write() == folder
    assert foundry.prove(f"{INT4}:1").answer


@pytest.mark.parametrize(
    "model_id", ["home", "home:0", "home:01", "Home:1", "../home:1", "home-int4", "home:1:1", "home:x", "-home:1", ""]
)
def test_an_id_of_another_form_is_refused(model_id):
    with pytest.raises(BadInput, check=coded("foundry-id-not-valid")):
        check_model_id(model_id)


def conversations_of(family):
    return [PLAIN, TURNS, WITH_SYSTEM] if FAMILIES[family][1] else [PLAIN, TURNS]


@pytest.fixture(scope="module")
def families(model_dir, tmp_path_factory):
    """Per family: a model folder with its tokenizer and chat template, and its prompts in transformers and genai."""
    directory = tmp_path_factory.mktemp("families")
    styles = {style for style, _ in FAMILIES.values()}
    checkpoints = {style: make_tiny_checkpoint(directory / style, chat_template=style) for style in styles}
    folders = {}
    for family, (style, _) in FAMILIES.items():
        folder = folders[family] = Path(shutil.copytree(model_dir, directory / f"{family}-model"))
        for path in checkpoints[style].glob("tokenizer*"):
            shutil.copy(path, folder)
        shutil.copy(TEMPLATES / f"{family}.jinja", folder / "chat_template.jinja")
        begin, end = BEGIN_AND_END_TOKENS[style]
        tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        config = json.loads((folder / "genai_config.json").read_text("utf-8"))
        config["model"] |= {"eos_token_id": ids[end], "bos_token_id": ids[begin or end]}
        (folder / "genai_config.json").write_text(json.dumps(config))
    runner = Foundry(directory, model_dir)
    conversations = {str(folder): conversations_of(family) for family, folder in folders.items()}
    reference = runner.run(CountInTransformers, conversations=conversations)
    answers = runner.run(AnswerInGenai, conversations=conversations)
    return {family: (folder, reference[str(folder)], answers[str(folder)]) for family, folder in folders.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_foundry_renders_prompts_as_transformers_and_genai_do(family, families, foundry):
    folder, reference, answers = families[family]
    assert reference == [answer["prompt_tokens"] for answer in answers]
    foundry.register(f"{INT4}:1", foundry.write(model_dir=folder))
    for messages, answer in zip(conversations_of(family), answers, strict=True):
        proof = foundry.prove(f"{INT4}:1", messages)
        assert {key: getattr(proof, key) for key in ("answer", "prompt_tokens")} == answer
    if not FAMILIES[family][1]:
        with pytest.raises(StageFailed, check=coded("foundry-failed", "System role not supported")):
            foundry.prove(f"{INT4}:1", WITH_SYSTEM)


def test_an_answer_ends_with_the_context(foundry):
    foundry.register(f"{INT4}:1", foundry.write())
    words = "light " * 300
    proof = foundry.prove(f"{INT4}:1", [{"role": "user", "content": words}], max_new_tokens=5000)
    assert proof.prompt_tokens + proof.completion_tokens == 1024
    with pytest.raises(StageFailed, check=coded("prompt-too-long", "1024 tokens")):
        foundry.prove(f"{INT4}:1", [{"role": "user", "content": words * 4}])


def test_a_conversation_goes_on_over_several_turns(foundry, tmp_path):
    foundry.register(f"{INT4}:1", foundry.write())
    messages = list(PLAIN)
    with FoundryChat(foundry.cache_dir, f"{INT4}:1", log_path=tmp_path / "chat.log") as chat:
        assert chat.load_ms > 0
        for turn in range(2):
            pieces = list(chat.answer(messages, NEW_TOKENS))
            assert len(pieces) > 1
            expected = foundry.genai(messages)
            assert ("".join(pieces), chat.last["prompt_tokens"]) == (expected["answer"], expected["prompt_tokens"])
            messages += [{"role": "assistant", "content": "".join(pieces)}, {"role": "user", "content": f"And {turn}?"}]
        with pytest.raises(StageFailed, check=coded("prompt-too-long")):
            list(chat.answer([{"role": "user", "content": "light " * 2000}], NEW_TOKENS))
        assert "".join(chat.answer(PLAIN, NEW_TOKENS))


def test_a_chat_with_an_unknown_model_is_refused(foundry, tmp_path):
    with pytest.raises(StageFailed, check=coded("foundry-model-unknown", "home:1;", ": none")):
        FoundryChat(foundry.cache_dir, "home:1", log_path=tmp_path / "chat.log")


def test_the_runtime_is_made_of_the_versions_that_the_sdk_asks_for(foundry):
    versions = foundry.run(DescribeRuntime)
    assert set(versions.required) == {"onnxruntime", "onnxruntime-genai-core"}
    assert versions.installed == versions.required
    assert versions.native == versions.sdk


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace (from the system's package manager) is missing")
def test_nothing_leaves_the_machine_or_the_cache_directory(foundry, tmp_path):
    foundry.register(f"{INT4}:1", foundry.write())
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    request = {"cache_dir": str(foundry.cache_dir), "model_id": f"{INT4}:1", "messages": PLAIN, "max_new_tokens": 8}
    # The user's environment asks for as much telemetry as it can.
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "CI": "false"}
    process = subprocess.Popen(
        [
            *STRACE,
            str(trace),
            sys.executable,
            "-B",
            "-m",
            "slmops.infra.process.child",
            Prove.target(),
        ],
        env=environment,
        cwd=home,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin and process.stdout
    call = {
        "call": Prove.target(),
        "request": request,
        "log_path": os.devnull,
        "work_dir": str(home),
        "is_last": True,
    }
    process.stdin.write(json.dumps(call).encode() + b"\n")
    process.stdin.flush()
    messages = [json.loads(line) for line in process.stdout]
    process.stdin.close()
    assert process.wait(60) == 0
    assert messages[-1]["result"]["answer"]

    calls = trace.read_text("utf-8", "replace").splitlines()
    assert any("libfoundry_local" in call for call in calls)
    assert not [call for call in calls if "connect(" in call or "sendto(" in call or "/etc/resolv.conf" in call]
    written = [
        call for call in calls if ("O_WRONLY" in call or "O_RDWR" in call or "mkdir" in call) and "/dev/" not in call
    ]
    assert written
    assert not [call for call in written if str(foundry.cache_dir) not in call]
    assert list(home.iterdir()) == []
