"""Every bad input through the command line: one clear sentence, exit status 2, and nothing written anywhere."""

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from syrupy.assertion import SnapshotAssertion

from slmops.deployments.cli import app as cli
from tests.infra.gguf.test_file import write_gguf
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.snapshots import PlainText

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Case:
    """The damage to a copy of the tiny checkpoint, the options, and a part of the expected message."""

    said: str
    damage: Callable[[Path], Any] = lambda folder: None
    options: tuple[str, ...] = ()
    name: str = "home"
    checkpoint: str = "{checkpoint}"
    environment: dict[str, str] = field(default_factory=dict)


def change_config(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove(pattern: str) -> Callable[[Path], Any]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def remove_chat_template(folder: Path) -> None:
    remove("chat_template*")(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text("utf-8"))
    content.pop("chat_template", None)
    path.write_text(json.dumps(content), "utf-8")


def add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 600, "content": "<new>", "special": False})
    path.write_text(json.dumps(content), "utf-8")


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text, "utf-8")


def gguf(architecture: str = "llama", *, cut: int = 0, **changes: Any) -> Callable[[Path], Any]:
    def add(folder: Path) -> None:
        path = write_gguf(folder / "model.gguf", architecture, **changes)
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])

    return add


GOOD_ROW = '{"id": 1, "messages": [{"role": "user", "content": "x"}], "expected": "y"}'
OLIVE = '{"input_model": {"type": "HfModel", "model_path": "x"}, "passes": {"p": {"type": "%s"}}}'

CALIBRATION = ("--calibration", "{checkpoint}/chats.jsonl", "--eval", "{checkpoint}/eval.jsonl")


def write_chats(*chats: tuple[str, str]) -> Callable[[Path], Any]:
    """Write chats to calibrate on, beside an evaluation file whose one row asks x."""

    def change(folder: Path) -> None:
        lines = [
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
            for q, a in chats
        ]
        (folder / "chats.jsonl").write_text("".join(lines), "utf-8")
        (folder / "eval.jsonl").write_text(GOOD_ROW, "utf-8")

    return change


CASES = {
    "no chats to calibrate on": Case("has no rows", write_chats(), CALIBRATION),
    "a chat that is judged": Case("Chat 2 of the calibration", write_chats(("y", "z"), ("x", "y")), CALIBRATION),
    "a chat beyond the context": Case("the model's context is", write_chats(("why", "x y " * 2000)), CALIBRATION),
    "missing path": Case("no such folder", checkpoint="{checkpoint}-gone"),
    "a file": Case("is a file", checkpoint="{checkpoint}/config.json"),
    "no config": Case("has no config.json", remove("config.json")),
    "broken json": Case("not valid JSON", write("config.json", '{"a": ')),
    "olmo2": Case("Olmo2ForCausalLM is not supported", change_config(architectures=["Olmo2ForCausalLM"])),
    "gpt2": Case("GPT2LMHeadModel is not supported", change_config(architectures=["GPT2LMHeadModel"])),
    "a kernel from the Hub": Case(
        "fetch from the Hub", change_config(attn_implementation="kernels-community/flash-attn")
    ),
    "a token without a row": Case("'<new>'", add_token),
    "gguf cut off": Case("is truncated", gguf(cut=100), checkpoint="{checkpoint}/model.gguf"),
    "gguf of another kind": Case("'mamba'", gguf("mamba"), checkpoint="{checkpoint}/model.gguf"),
    "gguf in parts": Case("one of 3 parts", gguf(**{"split.count": 3}), checkpoint="{checkpoint}/model.gguf"),
    "gguf by name only": Case("GGUF", write("model.gguf", "GGML"), checkpoint="{checkpoint}/model.gguf"),
    "truncated weights": Case("not a whole safetensors file", truncate),
    "other shapes": Case("config.json says", change_config(hidden_size=128)),
    "pickled weights": Case(
        "a pickle", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    ),
    "no tokenizer": Case("has no tokenizer", remove("tokenizer*")),
    "no chat template": Case("--chat-template", remove_chat_template),
    "missing shard": Case(
        "has no model-2.safetensors",
        write("model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}'),
    ),
    "leaving index": Case(
        "not a file of this folder", write("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}')
    ),
    "name with dots": Case("not valid", name=".."),
    "name with a slash": Case("not valid", name="a/b"),
    "name with a space": Case("not valid", name="a b"),
    "name with a colon": Case("not valid", name="a:1"),
    "long name": Case("not valid", name="a" * 300),
    "name not in ASCII": Case("not valid", name="größe"),
    "empty name": Case("not valid", name=""),
    "unknown precision": Case("'int3' is unknown", options=("--precision", "int4", "--precision", "int3")),
    "unknown device": Case("'tpu'", options=("--device", "tpu")),
    "npu": Case("NPU", options=("--device", "npu")),
    "provider of another device": Case("does not run on", options=("--provider", "cuda")),
    "own evaluation file with a bad line": Case("Line 2", write("eval.jsonl", f"{GOOD_ROW}\nnot json\n")),
    "evaluation file with a bad line": Case(
        "Line 3", write("rows.jsonl", f'{GOOD_ROW}\n\n{{"id": 2}}\n'), ("--eval", "{checkpoint}/rows.jsonl")
    ),
    "missing evaluation file": Case("cannot be read", options=("--eval", "{checkpoint}/gone.jsonl")),
    "empty evaluation file": Case("has no rows", write("rows.jsonl", "\n"), ("--eval", "{checkpoint}/rows.jsonl")),
    "the same id twice": Case("already used in line 1", write("eval.jsonl", f"{GOOD_ROW}\n{GOOD_ROW}\n")),
    "evaluation file in Latin-1": Case(
        "not UTF-8", lambda folder: (folder / "eval.jsonl").write_bytes(b'{"id": "\xe4"}\n')
    ),
    "a line of 50 MB": Case("longer than", lambda folder: (folder / "eval.jsonl").write_bytes(b"x" * 50_000_000)),
    "template with an unknown filter": Case(
        "No filter named 'shout', line 2.", write("chat_template.jinja", "{{ messages[0].role }}\n{{ 'a' | shout }}")
    ),
    "unknown scorer": Case("'bleu'", write("eval.jsonl", GOOD_ROW), ("--scorer", "bleu")),
    "expected that is no number": Case("number", write("eval.jsonl", GOOD_ROW), ("--scorer", "numeric")),
    "invalid schema": Case(
        "schema", write("schema.txt", '{"type": "objekt"}'), ("--output-schema", "{checkpoint}/schema.txt")
    ),
    "schema that is no JSON": Case("JSON", write("schema.txt", "{"), ("--output-schema", "{checkpoint}/schema.txt")),
    "missing schema": Case("gone.json", options=("--output-schema", "{checkpoint}/gone.json")),
    "regular expression that runs away": Case("backtracks without end", options=("--output-regex", "^(a|aa)+$")),
    "broken regular expression": Case("not valid: missing )", options=("--output-regex", "(")),
    "schema and regular expression": Case(
        "one", write("schema.txt", "{}"), ("--output-schema", "{checkpoint}/schema.txt", "--output-regex", "x")
    ),
    "missing text": Case("cannot be read", options=("--text", "{checkpoint}/gone.txt")),
    "empty text": Case("is empty", write("text.txt", "\n"), ("--text", "{checkpoint}/text.txt")),
    "binary text": Case("not text", options=("--text", "{checkpoint}/model.safetensors")),
    "unknown budget": Case("'max-weight=3kg' is unknown", options=("--budget", "max-weight=3kg")),
    "budget without a unit": Case("no valid value", options=("--budget", "max-ttft=200")),
    "budget given twice": Case("twice", options=("--budget", "min-tps=1", "--budget", "min-tps=2")),
    "unknown check": Case("'kl' is unknown", options=("--allow", "kl")),
    "check that nobody may allow": Case("'vocabulary' cannot", options=("--allow", "vocabulary")),
    "unknown recipe": Case("int4-block64", options=("--recipe", "int4-block64")),
    "recipe of another precision": Case("int8", options=("--precision", "int8", "--recipe", "int4-block128")),
    "two recipes of a precision": Case("int4", options=("--recipe", "int4-block128", "--recipe", "int4-asymmetric")),
    "recipe beside an olive config": Case(
        "recipe", write("olive.txt", "{}"), ("--olive-config", "{checkpoint}/olive.txt", "--recipe", "int4-block128")
    ),
    "unknown olive pass": Case(
        "OnnxMagic", write("olive.txt", OLIVE % "OnnxMagic"), ("--olive-config", "{checkpoint}/olive.txt")
    ),
    "broken olive config": Case("JSON", write("olive.txt", "{"), ("--olive-config", "{checkpoint}/olive.txt")),
    "missing olive config": Case("gone.json", options=("--olive-config", "{checkpoint}/gone.json")),
    "broken chat template": Case(
        "not valid Jinja", write("x.jinja", "{% for"), ("--chat-template", "{checkpoint}/x.jinja")
    ),
    "missing chat template": Case("cannot be read", options=("--chat-template", "{checkpoint}/gone.jinja")),
    "taken output": Case("not an empty folder", options=("--output", "{checkpoint}")),
    "too little memory": Case("Too little memory", environment={"SLMOPS_MACHINE__RAM_BYTES": "1000000"}),
    "too little disk": Case("Too little disk", environment={"SLMOPS_MACHINE__DISK_BYTES": "1000000"}),
    "unknown setting": Case("SLMOPS_GATE__NONE", environment={"SLMOPS_GATE__NONE": "1"}),
    "setting out of range": Case(
        "SLMOPS_GATE__MIN_TOP1_AGREEMENT", environment={"SLMOPS_GATE__MIN_TOP1_AGREEMENT": "7"}
    ),
    "setting that is no JSON": Case("SLMOPS_BENCHMARK", environment={"SLMOPS_BENCHMARK__PROMPT_TOKENS": "1,2"}),
    "unknown store": Case("cannot be opened", environment={"SLMOPS_STORE__URI": "ftp://server/store"}),
    "no key": Case("=3", options=("--model-config", "=3")),
    "unknown model config": Case("'tempo=3' is unknown", options=("--model-config", "tempo=3")),
    "model config without a number": Case("no valid number", options=("--model-config", "top_p=high")),
    "model config without a value": Case("no valid number", options=("--model-config", "top_p")),
    "model config out of range": Case("top_p is 1.5", options=("--model-config", "top_p=1.5")),
    "model config that is not a number": Case("temperature is nan", options=("--model-config", "temperature=nan")),
    "threshold out of range": Case("min_top1_agreement is 2", options=("--min-top1-agreement", "2")),
    "threshold without end": Case("max_kl_divergence is inf", options=("--max-kl-divergence", "inf")),
    "threshold that is no number": Case("--min-top1-agreement", options=("--min-top1-agreement", "high")),
    "unknown option": Case("--frobnicate", options=("--frobnicate",)),
    "option without its value": Case("--eval", options=("--eval",)),
    "unknown log level": Case("'loud' is unknown", options=("--log-level", "loud")),
    "revision of a folder": Case("no revisions", options=("--revision", "main")),
    "hostile hub id": Case("OWNER/NAME", checkpoint="owner/..name"),
    "hostile revision": Case("revision", checkpoint="owner/name@../../x"),
    "s3 without a folder": Case("s3://BUCKET/FOLDER", checkpoint="s3://bucket"),
    "other scheme": Case("s3://", checkpoint="https://huggingface.co/owner/name"),
    "hub id without network": Case("cannot be reached", checkpoint="owner/name"),
    "adapter without its base": Case(
        "which base", lambda folder: make_adapter(folder, {"peft_type": "LORA"}), ("--precision", "int8")
    ),
    "adapter with a missing base": Case(
        "no such folder", lambda folder: make_adapter(folder, {"peft_type": "LORA"}), ("--base", "/gone/for/good")
    ),
    "adapter that needs code": Case(
        "code to run",
        lambda folder: make_adapter(folder, {"peft_type": "LORA", "auto_mapping": {"parent_library": "mine"}}),
    ),
    "adapter that is no LoRA": Case("IA3", lambda folder: make_adapter(folder, {"peft_type": "IA3"})),
    "genai folder without its model": Case("without its ONNX model", write("genai_config.json", "{}")),
}


def make_adapter(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Box:
    """A machine's folders as they are before slmops ran: an empty user's home, and no home of slmops."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.user_home, self.home, self.work = tmp_path / "user", tmp_path / "slmops-home", tmp_path / "work"
        self.user_home.mkdir()
        self.work.mkdir()
        self.variables = {
            "HOME": str(self.user_home),
            "USERPROFILE": str(self.user_home),
            "XDG_CACHE_HOME": str(self.user_home / ".cache"),
            "SLMOPS_HOME": str(self.home),
            "HF_HUB_OFFLINE": "1",
        }
        for name, value in self.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("PREFECT_HOME", raising=False)
        monkeypatch.delenv("HF_HOME", raising=False)
        monkeypatch.chdir(self.work)

    def assert_untouched(self) -> None:
        assert not self.home.exists(), list(self.home.rglob("*"))
        assert list(self.user_home.rglob("*")) == []
        assert list(self.work.iterdir()) == []
        running = [child.cmdline() for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
        assert not any("slmops.deployments.server.embedded" in command for command in running)


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: None) -> Box:
    return Box(tmp_path, monkeypatch)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **_: Any) -> None:
        pytest.fail(f"looked for the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def prepared(case: Case, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Damage a copy of the checkpoint and return the command line of the case."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    case.damage(checkpoint)
    for variable, value in case.environment.items():
        monkeypatch.setenv(variable, value)
    arguments = ["deploy", case.checkpoint, "--name", case.name, *case.options]
    return [text.replace("{checkpoint}", str(checkpoint)) for text in arguments]


OF_EACH_KIND = [
    "truncated weights",
    "olmo2",
    "evaluation file with a bad line",
    "hub id without network",
    "unknown option",
]


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_one_sentence_and_nothing_is_written(
    case: str,
    tiny_checkpoint: Path,
    box: Box,
    no_network: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if case not in OF_EACH_KIND:  # these start a server of their own, and end it
        monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    arguments = prepared(CASES[case], tiny_checkpoint, tmp_path, monkeypatch)

    assert cli.run(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert 1 <= len(err.splitlines()) <= 2  # what was wrong, and what to do
    assert CASES[case].said in err
    box.assert_untouched()

    assert cli.run([*arguments[:1], "--json", *arguments[1:]]) == 2
    out, err = capfd.readouterr()
    error = json.loads(out)["error"]
    assert set(error) == {"message", "what_to_do"}
    assert CASES[case].said in f"{error['message']} {error['what_to_do']}"
    assert err == ""
    box.assert_untouched()


@pytest.mark.parametrize("case", OF_EACH_KIND)
def test_the_same_from_a_shell(
    case: str, tiny_checkpoint: Path, box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = prepared(CASES[case], tiny_checkpoint, tmp_path, monkeypatch)
    done = subprocess.run(
        [sys.executable, "-m", "slmops", *arguments, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=box.work,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert CASES[case].said in done.stdout
    assert set(json.loads(done.stdout)) == {"error"}
    assert done.stderr == ""
    box.assert_untouched()


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_a_real_checkpoint_of_an_unsupported_architecture(
    family: str, box: Box, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", family)
    capfd.readouterr()
    assert cli.run(["deploy", str(checkpoint), "--name", "home"]) == 2
    assert "is not supported" in capfd.readouterr().err
    box.assert_untouched()


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    tiny_checkpoint: Path,
    box: Box,
    no_network: None,
    capfd: pytest.CaptureFixture[str],
    snapshot: SnapshotAssertion,
) -> None:
    assert cli.run(["deploy", str(tiny_checkpoint), "--name", "home", "--dry-run", "--json"]) == 0
    out, err = capfd.readouterr()
    plan = json.loads(out)
    assert plan["name"] == "home"
    first = ["calibrate", "build fp16", "build int8", "build int4", "reference"]
    assert [stage["stage"] for stage in plan["stages"]][:5] == first
    assert plan["time_s"] == pytest.approx(sum(stage["time_s"] for stage in plan["stages"]))
    assert err == ""
    assert cli.run(["deploy", str(tiny_checkpoint), "--name", "home", "--dry-run"]) == 0
    assert capfd.readouterr().out == snapshot(extension_class=PlainText)
    box.assert_untouched()


def test_a_check_is_printed_as_it_is_recorded(
    tiny_checkpoint: Path,
    box: Box,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    snapshot: SnapshotAssertion,
) -> None:
    for name in ("RAM", "DISK"):
        monkeypatch.setenv(f"SLMOPS_MACHINE__{name}_BYTES", "16000000000")
    monkeypatch.setattr("slmops.deployments.cli.output.PIPED_WIDTH", 1000)  # the folder's name may be long
    assert cli.run(["check", str(tiny_checkpoint)]) == 0
    printed = re.sub(r" {2,}", "  ", capfd.readouterr().out).replace(" \n", "\n")
    this_machine = (
        rf"(Python  [^\n]*?  )3\.\S+|(64 bit  ){platform.system()} \S+|\+cpu|(?<=within )\S+|(?:file|/|\w:)\S*(?=home)"
        r"|(execution providers  cpu  )[^\n]*"
    )
    assert re.sub(this_machine, r"\1\2\3", printed) == snapshot(extension_class=PlainText)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "home"], "no home"),
        (["show", "home@3"], "no home@3"),
        (["show", "../home"], "not valid"),
        (["show", "home@x"], "names no version"),
        (["regate", "home@1"], "no home@1"),
        (["benchmark", "home"], "no home"),
        (["logs", "home@1"], "no home@1"),
        (["delete", "home@1", "--yes"], "no home@1"),
        (["unregister", "home@1"], "no home@1"),
        (["chat", "home"], "no home"),
        (["check", "/gone/for/good"], "no checkpoint at"),
        (["frobnicate"], "frobnicate"),
        (["deploy"], "CHECKPOINT"),
        (["deploy", "here"], "--name"),
        (["make-demo"], "DIRECTORY"),
        (["make-demo", "somewhere", "--seed", "x"], "--seed"),
    ],
)
def test_other_commands_refuse_alike(
    arguments: list[str], said: str, box: Box, no_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("error:") == 1
    assert said.lower() in err.lower()
    assert "Traceback" not in err
    box.assert_untouched()


@pytest.mark.parametrize(
    "arguments", [["list"], ["config"], ["recipes"], ["foundry-dir"], ["--version"], ["--help"], []]
)
def test_what_only_reads_writes_nothing(
    arguments: list[str], box: Box, no_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 0
    assert capfd.readouterr().out
    box.assert_untouched()


def test_json_of_what_only_reads(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"models": []}
    assert cli.run(["config", "--json"]) == 0
    settings = json.loads(capfd.readouterr().out)["settings"]
    shown = {setting["variable"]: (setting["value"], setting["source"]) for setting in settings}
    assert shown["SLMOPS_HOME"] == (str(box.home), "environment")
    assert shown["SLMOPS_STORE__SECRET_ACCESS_KEY"] == (None, "default")
    box.assert_untouched()


def test_a_home_that_is_a_file_is_refused(tiny_checkpoint: Path, box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    box.home.write_text("not a folder")
    assert cli.run(["deploy", str(tiny_checkpoint), "--name", "home"]) == 2
    err = capfd.readouterr().err
    assert "SLMOPS_HOME" in err
    assert "Traceback" not in err
    assert box.home.read_text() == "not a folder"


CHAT = '{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "%s"}]}\n'
GOOD_CHATS = CHAT % "good morning" + CHAT % "good evening"


@pytest.mark.parametrize(
    ("chats", "base", "options", "said"),
    [
        ("", "{checkpoint}", (), "has no rows"),
        (GOOD_CHATS + "{\n", "{checkpoint}", (), "line 3"),
        (GOOD_CHATS.replace('"assistant"', '"user"'), "{checkpoint}", (), "must alternate"),
        (2 * (CHAT % "hi"), "{checkpoint}", (), "only one distinct example"),
        (GOOD_CHATS, "/gone/for/good", (), "no such folder"),
        (GOOD_CHATS, "{checkpoint}", ("--epochs", "0"), "epochs"),
        (GOOD_CHATS, "{checkpoint}", ("--method", "magic"), "method"),
        (GOOD_CHATS, "{checkpoint}", ("--precision", "int2"), "'int2' is unknown"),
        (GOOD_CHATS, "{checkpoint}", ("--name", "../home"), "not valid"),
    ],
    ids=["no rows", "broken line", "roles", "one example", "no base", "epochs", "method", "precision", "name"],
)
def test_a_retrain_is_refused_before_anything_is_written(
    chats: str,
    base: str,
    options: tuple[str, ...],
    said: str,
    tiny_checkpoint: Path,
    box: Box,
    no_network: None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    dataset = tmp_path / "chats.jsonl"
    dataset.write_text(chats, "utf-8")
    base = base.replace("{checkpoint}", str(tiny_checkpoint))
    assert cli.run(["retrain", str(dataset), "--base", base, "--name", "home", *options]) == 2
    out, err = capfd.readouterr()
    assert said in err
    assert "Traceback" not in err
    assert out == ""
    box.assert_untouched()
