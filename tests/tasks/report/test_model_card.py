"""The model card: metadata that huggingface_hub reads back, and text that says what there is to know."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load
from syrupy.assertion import SnapshotAssertion

from slmops.infra.foundry.calls import Register
from slmops.infra.foundry.model_folder import write_model_folder
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.storage.manifest import Manifest, Source
from slmops.tasks.report.model_card import base_model_of, model_card
from slmops.tasks.report.records import VariantDetails, VariantReport
from tests.support.genai_models import build_genai_model
from tests.support.reports import full_variant
from tests.support.snapshots import Markdown
from tests.tasks.report.test_report import HOSTILE, PARSER, markup_of

EVALUATION = "120 rows of /home/me/secret project/eval.jsonl"


def manifest(origin: str = "/home/me/checkpoints/home") -> Manifest:
    return Manifest(
        name="home",
        version=3,
        source=Source(digest="3f" * 32, origin=origin, architecture="Qwen2ForCausalLM", parameters=19_600_000),
        builder={"olive-ai": "0.13.0", "onnxruntime-genai": "0.18.0"},
        variants=(),
        created_at="2026-11-22T10:03:11+00:00",
    )


def read_back(text: str, tmp_path: Path) -> ModelCard:
    path = tmp_path / "README.md"
    path.write_text(text, "utf-8")
    assert metadata_load(path)
    return ModelCard.load(path)


def test_its_metadata_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    text = model_card(manifest(), full_variant("int4"), evaluation=EVALUATION, base_model="owner/home-1b")
    data = read_back(text, tmp_path).data.to_dict()
    assert data["base_model"] == "owner/home-1b"
    assert data["base_model_relation"] == "quantized"
    assert data["pipeline_tag"] == "text-generation"
    assert data["library_name"] == "onnxruntime-genai"
    assert {"onnx", "foundry-local", "int4"} <= set(data["tags"])
    (model,) = data["model-index"]
    assert model["name"] == "home-int4"
    (result,) = model["results"]
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"]["name"] == "120 rows of eval.jsonl"
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    metrics = full_variant("int4").metrics
    assert values == {name: metrics[name] for name in values}
    assert set(values) == {"exact_match", "perplexity", "score", "top1_agreement", "kl_divergence"}


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    bare = VariantReport(precision="int4", status="registered")
    data = read_back(model_card(manifest(), bare, evaluation="12 rows of slmops' own chats"), tmp_path).data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "model-index"} & set(data)
    assert "## Figures" not in model_card(manifest(), bare, evaluation="")


def test_it_reads_as_it_is_recorded(snapshot: SnapshotAssertion) -> None:
    text = model_card(manifest(), full_variant("int4"), evaluation=EVALUATION, description="Turns words into actions.")
    assert text == snapshot(extension_class=Markdown)
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(program, "example", "exec")


def test_no_path_of_this_machine_is_in_it() -> None:
    text = model_card(manifest("C:\\Users\\me\\home\\"), full_variant("int4"), evaluation=EVALUATION)
    assert not re.search(r"/home/me|secret project|Users", text)
    assert "made of `home`" in text


@pytest.mark.parametrize("hostile", [*HOSTILE, "---\nlicense: mit\n---", "{{ 7 * 7 }}"])
def test_a_description_is_text_and_no_metadata(hostile: str, tmp_path: Path) -> None:
    bare = full_variant("int4", details=VariantDetails())
    text = model_card(manifest(), bare, evaluation=f"3 rows of {hostile}", description=hostile)
    card = read_back(text, tmp_path)
    assert card.data.to_dict().get("license") is None
    assert markup_of(card.text) == set()
    assert "49" not in PARSER.render(card.text.split("##")[0])


def test_a_hub_id_is_a_base_model_and_a_folder_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "home").mkdir(parents=True)
    assert base_model_of("owner/name@main") == "owner/name"
    assert base_model_of("models/home") is None
    assert base_model_of("s3://bucket/folder") is None
    assert base_model_of("/gone/folder") is None


@pytest.mark.slow
def test_its_examples_run_as_they_stand(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = build_genai_model(tiny_checkpoint, tmp_path / "model")
    card = model_card(manifest(), full_variant("int4"), evaluation=EVALUATION)
    in_foundry, in_genai = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert run_program(in_genai, model)

    name = {"Name": "home-int4-generic-cpu:3"}
    files = {path.name: path for path in model.iterdir()}
    cache = tmp_path / "foundry"
    folder = write_model_folder(cache, "home", "int4", 3, sources=files, inference_model=name, model_card=card)
    assert read_back((folder / "README.md").read_text("utf-8"), tmp_path)
    run_in_child(
        Register(cache_dir=cache, model_id=name["Name"], folder=folder),
        deadline_s=120,
        log_path=tmp_path / "child.log",
        work_dir=tmp_path / "work",
    )
    assert run_program(in_foundry.replace('"FOLDER"', repr(str(cache))), tmp_path)


def run_program(program: str, folder: Path) -> str:
    """Run a Python program in a folder and return what it prints."""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
