"""Deploys of tiny checkpoints with random weights: every kind of input, every way that a deploy can end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from huggingface_hub import metadata_load

from slmops.infra.olive.calls import Build
from slmops.infra.process.call import Call, ChildResult
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.checkpoint.inspection import content_digest
from slmops.tasks.exams.answers import EVALUATION
from slmops.tasks.exams.endurance import ENDURANCE, Endurance
from tests.e2e.conftest import ROOT, Slmops
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.torch_process import TORCH_PROCESS
from tests.support.versions import store_version

INT8 = ("--precision", "int8")
INT4 = ("--precision", "int4")


# Every family's build is proven in tests/infra/olive/test_families.py, its answers in Foundry Local in
# tests/infra/foundry/test_families.py. This one and the Phi-3 below differ most from the Qwen2 of the other journeys.
@pytest.mark.slow
def test_another_family_deploys(slmops: Slmops, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "granite")
    report = slmops.json("deploy", checkpoint, "--name", "granite", *INT8)
    assert report["status"] == "registered"
    (variant,) = report["variants"]
    assert variant["foundry_model_id"] == "granite-int8-generic-cpu:1"
    assert report["foundry_model_id"] == "granite:1"


def without_soak(found: Endurance) -> bool:
    return any("No soak was requested" in note for note in found.notes)


@pytest.mark.slow
def test_a_first_look_is_short_and_makes_no_champion(slmops: Slmops, tiny: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "hello"}], "expected": "hi"}
    rows.write_text("".join(json.dumps({"id": number, **row}) + "\n" for number in range(21)))
    asked = ("deploy", tiny, "--name", "home", "--eval", rows)
    report = slmops.json(*asked, "--quick", SLMOPS_EVALUATION__MAX_ROWS="21")
    assert (report["status"], report["aliases"], report["foundry_model_id"]) == ("registered", [], None)
    assert [variant["precision"] for variant in report["variants"]] == ["int8"]
    assert any("first look" in warning for warning in report["warnings"])
    version = ModelRegistry(LocalObjectStore(slmops.home / "store")).find("home@1")
    (evaluated,) = version.all(EVALUATION)
    assert [row.id for row in evaluated.rows] == [0, 10, 20]
    assert [without_soak(found) for found in version.all(ENDURANCE)] == [True, True]
    whole = slmops.json(*asked, *INT8)
    assert (whole["version"], whole["aliases"], whole["foundry_model_id"]) == (1, ["champion"], "home:1")
    assert [without_soak(found) for found in version.all(ENDURANCE)] == [True, True, False, False]


@pytest.mark.slow
def test_versions_aliases_and_promotion(slmops: Slmops, tiny: Path, tmp_path: Path) -> None:
    first = slmops.json("deploy", tiny, "--name", "home", *INT8)
    assert (first["version"], first["aliases"], first["foundry_model_id"]) == (1, ["champion"], "home:1")

    other = make_tiny_checkpoint(tmp_path / "other", "qwen2", seed=1)
    second = slmops.json("deploy", other, "--name", "home", *INT8)
    assert (second["version"], second["aliases"], second["foundry_model_id"]) == (2, ["candidate"], None)

    promoted = slmops.json("deploy", other, "--name", "home", *INT8, "--promote")
    assert (promoted["status"], promoted["version"]) == ("unchanged", 2)
    assert (promoted["aliases"], promoted["foundry_model_id"]) == (["champion"], "home:2")
    removed = slmops.run("unregister", "home@1").stdout
    assert "home-int8-generic-cpu:1" in removed
    assert "home:1" not in removed  # the former champion gave its plain id up when it was replaced

    slmops.run("delete", "home@1", "--yes")
    models = slmops.json("list")["models"]
    assert [(model["name"], model["version"]) for model in models] == [("home", 2)]
    slmops.run("delete", "home@2", "--yes")
    registry = ModelRegistry(LocalObjectStore(slmops.home / "store"))
    assert store_version(registry, tmp_path / "again").version == 3  # a number is never given out twice


@pytest.mark.slow
def test_a_variant_that_cannot_be_built_fails_and_there_is_no_version(
    slmops: Slmops, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TORCH_PROCESS.run

    def hurried(call: Call[Any], **options: Any) -> ChildResult[Any]:
        """Give builds a deadline that none of them keeps."""
        return run(call, **{**options, "deadline_s": 0.05} if isinstance(call, Build) else options)

    monkeypatch.setattr(TORCH_PROCESS, "run", hurried)
    report = slmops.json("deploy", tiny, "--name", "home", *INT8, status=1)
    assert (report["status"], report["version"]) == ("failed", None)
    assert "deadline" in report["variants"][0]["error"]
    assert slmops.json("list") == {"models": []}


@pytest.mark.slow
def test_a_genai_folder_is_taken_as_it_is(slmops: Slmops, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    built = slmops.json("deploy", tiny, "--name", "source", *INT4, "--output", copy)
    assert built["status"] == "registered"
    files = {path.name for path in (copy / "int4").iterdir()}
    assert {"model.onnx", "genai_config.json", "tokenizer.json", "README.md"} <= files
    assert metadata_load(copy / "int4" / "README.md")["pipeline_tag"] == "text-generation"
    assert all(os.access(path, os.W_OK) for path in (copy / "int4").iterdir())

    report = slmops.json("deploy", copy / "int4", "--name", "given")
    assert report["status"] == "registered"
    (variant,) = report["variants"]
    assert (variant["precision"], variant["recipe"]) == ("int4", "as given")
    assert variant["digest"] == built["variants"][0]["digest"]
    checks = {check["name"] for check in variant["gate"]["checks"]}
    assert {"non_empty_answers", "finite_logits", "template_parity", "edge_input_foundry"} <= checks
    assert not checks & {"top1_agreement", "kl_divergence", "quality_loss"}  # there is nothing to compare it with


@pytest.mark.slow
def test_an_adapter_is_merged_into_its_base(slmops: Slmops, tiny: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    options = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), options)
    adapted.save_pretrained(tmp_path / "adapter")
    report = slmops.json("deploy", tmp_path / "adapter", "--name", "adapted", "--base", tiny, *INT8)
    assert report["status"] == "registered"
    source = slmops.json("show", "adapted@1")["source"]
    assert source["architecture"] == "Qwen2ForCausalLM"
    assert source["digest"] not in (content_digest(tiny), content_digest(tmp_path / "adapter"))


@pytest.mark.slow
def test_a_chat_template_and_generation_defaults_of_the_users_own(slmops: Slmops, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "phi3", chat_template="llama3")
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    options = ("--model-config", "max_length=99", "--model-config", "repetition_penalty=1.3")
    report = slmops.json("deploy", checkpoint, "--name", "own", *INT8, "--chat-template", template, *options)
    assert report["status"] == "registered"
    folder = slmops.home / "foundry" / "models" / "custom" / "own-int8" / "v1"
    described = json.loads((folder / "inference_model.json").read_text())
    assert described["PromptTemplate"]["prompt"] == "[user] {Content}\n[assistant] "
    assert (described["ModelConfig"]["max_length"], described["ModelConfig"]["repetition_penalty"]) == (99, 1.3)
    search = json.loads((folder / "genai_config.json").read_text())["search"]
    assert (search["max_length"], search["repetition_penalty"]) == (99, 1.3)


@pytest.mark.slow
def test_a_users_olive_file_is_accepted(slmops: Slmops, tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "olive.json"
    config.write_text(
        json.dumps(
            {
                "input_model": {"type": "HfModel", "model_path": "somewhere/else", "task": "text-generation"},
                "systems": {
                    "local_system": {
                        "type": "LocalSystem",
                        "accelerators": [{"execution_providers": ["CPUExecutionProvider"]}],
                    }
                },
                "passes": {
                    "builder": {
                        "type": "ModelBuilder",
                        "config": {
                            "precision": "int4",
                            "quantization_config": {"block_size": 16, "is_symmetric": True},
                        },
                    }
                },
                "host": "local_system",
                "target": "local_system",
                "cache_dir": "cache",
                "output_dir": "out",
            }
        )
    )
    report = slmops.json("deploy", tiny, "--name", "olive", "--olive-config", config)
    assert report["status"] == "registered"
    assert (report["variants"][0]["precision"], report["variants"][0]["recipe"]) == ("int4", "olive-config")


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return [
            child
            for child in psutil.Process(pid).children(recursive=True)
            if "slmops.infra.process.child" in child.cmdline()
        ]
    except psutil.Error:
        return []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_deploy_that_is_ended_leaves_no_orphan_and_goes_on_later(
    embedded: Slmops, tiny: Path, number: signal.Signals
) -> None:
    log = embedded.home.parent / "deploy.log"
    command = [sys.executable, "-m", "slmops", "deploy", str(tiny), "--name", "home", *INT8, *INT4]
    # What a shell runs in the background inherits that Ctrl-C is ignored, as these tests may be.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as output:
        deploy = subprocess.Popen(command, cwd=ROOT, env=embedded.variables(), stdout=output, stderr=output)
    signal.signal(signal.SIGINT, handler)
    deadline = time.monotonic() + 120
    builds = embedded.home / "cache" / "builds"
    while not (list(builds.glob("*.json")) and children_of(deploy.pid)):  # int8 is built, and int4 is under way
        assert deploy.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    descendants = psutil.Process(deploy.pid).children(recursive=True)
    assert any("slmops.deployments.server.embedded" in descendant.cmdline() for descendant in descendants)
    deploy.send_signal(number)
    assert deploy.wait(timeout=120) != 0
    assert "Traceback" not in log.read_text()
    _, alive = psutil.wait_procs(descendants, timeout=120)
    assert not alive
    assert embedded.json("list") == {"models": []}

    if number is signal.SIGKILL:  # the hardest end stands for all
        done = embedded.run("deploy", tiny, "--name", "home", *INT8, *INT4)
        assert "built before" in done.stderr
        assert "registered" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed: make apt")
def test_nothing_leaves_the_machine(embedded: Slmops, tiny: Path, tmp_path: Path) -> None:
    """No socket is connected to anything but loopback, and no name server is asked, in a whole deploy."""
    home = tmp_path / "user"
    home.mkdir()
    trace = tmp_path / "trace"
    # With its filter in the kernel the trace stops the processes for these calls only.
    command = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg"]
    command += ["-o", str(trace), sys.executable]
    command += ["-m", "slmops", "deploy", str(tiny), "--name", "home", *INT8]
    hostile = {
        **{"CI": "false", "DO_NOT_TRACK": "0", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "0"},
        **{"OLIVE_DISABLE_TELEMETRY": "0", "PREFECT_SERVER_ANALYTICS_ENABLED": "true", "ORT_TELEMETRY_DISABLED": "0"},
        **{"HTTP_PROXY": "http://203.0.113.1:3128", "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")},
    }
    environment = {name: value for name, value in embedded.variables(**hostile).items() if name.upper() != "NO_PROXY"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = trace.read_text().splitlines()
    internet = [call for call in calls if "AF_INET" in call]
    assert internet, "the trace must show at least Prefect's own loopback connections"
    elsewhere = [call for call in internet if "127.0.0.1" not in call and '"::1"' not in call]
    assert elsewhere == []
    assert [call for call in calls if "htons(53)" in call] == []
    assert list(home.iterdir()) == []
