"""The quality gate on whole journeys: the deployed model is the trained one, and measurements choose the precision."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.exams.endurance import ENDURANCE
from tests.e2e.conftest import Slmops
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.genai_models import build_genai_model
from tests.support.versions import stored_variant

Demo = tuple[Slmops, dict[str, Any]]
INT8 = ("--precision", "int8")


def variant_of(report: dict[str, Any], precision: str) -> dict[str, Any]:
    (found,) = [variant for variant in report["variants"] if variant["precision"] == precision]
    return found


def failed_checks(variant: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in variant["gate"]["checks"] if not check["passed"]}


@pytest.mark.slow
def test_the_demos_scores_come_with_intervals_and_int8_is_within_noise_of_the_reference(demo: Demo) -> None:
    _, report = demo
    assert report["reference_score"]["low"] <= report["reference_score"]["value"] <= report["reference_score"]["high"]
    for variant in report["variants"]:
        interval = variant["intervals"]["score"]
        assert interval["low"] <= variant["metrics"]["score"] == interval["value"] <= interval["high"]
        assert interval["high"] - interval["low"] > 0
        # The checkpoint itself misses the format in one answer of 200 or in none, by the arithmetic that trained it.
        assert max(0.95, variant["metrics"]["score"]) <= variant["metrics"]["output_conformity"] <= 1.0
    loss = variant_of(report, "int8")["intervals"]["quality_loss"]
    assert loss["low"] <= 0 <= loss["high"]


@pytest.mark.slow
def test_every_check_of_the_quality_list_has_figures_on_the_demo(demo: Demo) -> None:
    _, report = demo
    for variant in report["variants"]:
        checks = {check["name"]: check for check in variant["gate"]["checks"]}
        assert set(checks) == {
            "finite_logits",
            "top1_agreement",
            "kl_divergence",
            "quality_loss",
            "ended_answers",
            "output_format",
            "template_parity",
            "memory_growth_genai",
            "memory_growth_foundry",
            "valid_lengths",
            "steadiness",
            "edge_input_genai",
            "edge_input_foundry",
        }
        assert all(check["passed"] and check["value"] is not None for check in checks.values())


@pytest.mark.slow
def test_the_smallest_precision_is_selected_without_a_budget(demo: Demo) -> None:
    slmops, report = demo
    assert report["selected"] == "int4"
    assert report["reason"] == "int4 is the smallest precision that passed the gate."
    assert variant_of(report, "fp16")["reason"] == "int4 also passed the gate and is smaller"
    shown = slmops.json("show", "home@1")
    assert shown["deploy"]["selected"] == "int4"


@pytest.mark.slow
def test_a_budget_chooses_and_one_that_nothing_keeps_names_the_nearest(slmops: Slmops, tiny: Path) -> None:
    precisions = ("--precision", "fp16", "--precision", "int8")
    arguments = ("deploy", tiny, "--name", "home", *precisions)
    first = slmops.json(*arguments, "--budget", "max-size=1kB", status=3)
    assert (first["version"], first["aliases"], first["foundry_model_id"]) == (1, [], None)

    chosen = slmops.json(*arguments, "--budget", "max-rss=100GB", "--budget", "min-tps=0.001")
    assert chosen["selected"] in ("fp16", "int8")
    assert chosen["reason"].startswith(chosen["selected"])
    other = variant_of(chosen, "int8" if chosen["selected"] == "fp16" else "fp16")
    assert other["reason"]
    assert chosen["foundry_model_id"] == "home:1"

    limit = variant_of(chosen, "int8")["size_bytes"]
    smaller = slmops.json(*arguments, "--budget", f"max-size={limit}B")
    assert (smaller["selected"], smaller["version"]) == ("int8", 1)
    assert variant_of(smaller, "fp16")["reason"].startswith("over the budget: size")

    refused = slmops.json(*arguments, "--budget", "max-size=1kB", status=3)
    assert (refused["status"], refused["selected"]) == ("rejected", None)
    assert refused["reason"].startswith("No variant keeps the budget. The nearest is int8: size")
    assert refused["aliases"] == ["champion"]  # the version stays what it was
    assert {variant["status"] for variant in refused["variants"]} == {"registered"}


@pytest.mark.slow
def test_sabotaged_variants_are_rejected_by_the_right_check(demo: Demo, tmp_path: Path) -> None:
    slmops, _ = demo
    registry = ModelRegistry(LocalObjectStore(slmops.home / "store"))
    manifest = registry.version("home", 1).manifest
    folders = {}
    for variant in manifest.variants:
        folders[variant.precision] = tmp_path / variant.precision
        registry.copy_files(variant.files, folders[variant.precision])
    _zero_a_weight(folders["fp16"])
    _swap_the_template(folders["int8"])
    truncated = _truncate_the_vocabulary(slmops.home / "demo", tmp_path / "truncated")
    folders["int4"] = build_genai_model(truncated, tmp_path / "truncated-int4", "int4")
    version = _commit(registry, manifest, "sabotaged", folders)

    report = slmops.json("regate", version.reference, status=3)
    assert report["status"] == "rejected"
    zeroed = failed_checks(variant_of(report, "fp16"))
    assert {"quality_loss", "top1_agreement", "kl_divergence"} & set(zeroed)  # by the score where it decides
    parity = failed_checks(variant_of(report, "int8"))["template_parity"]
    assert "genai gives other tokens" in parity["detail"]
    vocabulary = failed_checks(variant_of(report, "int4"))["vocabulary"]
    assert vocabulary["detail"].endswith("the reference 640")
    assert tried_in(registry, "sabotaged") == {"fp16": "full", "int8": "full"}  # no other has the same template
    assert tried_in(registry, "home") == {"fp16": "short", "int8": "short", "int4": "full"}
    page = (slmops.home / "reports" / "sabotaged@1.html").read_text("utf-8")
    assert "&lt;|im_start|&gt;" in page and "swapped" in page  # both strings are shown
    slmops.run("delete", version.reference, "--yes")


def tried_in(registry: ModelRegistry, name: str) -> dict[str, str]:
    """The extent of each variant's edge inputs by the first version's evidence, where all runtimes have the same."""
    version = registry.version(name, 1)
    records = version.records(ENDURANCE)
    precisions = {variant.digest: variant.precision for variant in version.variants}
    extents = {(precisions[str(record.content["variant"])], record.value.extent) for record in records}
    assert len(extents) == len(dict(extents)) == len(records) / 2
    return dict(extents)


def _zero_a_weight(folder: Path) -> None:
    """Set the first layer's largest weight to zero, in the ONNX file itself."""
    model = onnx.load(folder / "model.onnx")
    tensors = [tensor for tensor in model.graph.initializer if "layers.0" in tensor.name]
    tensor = max(tensors, key=lambda one: int(np.prod(one.dims)))
    zeros = np.zeros_like(numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))
    (folder / "model.onnx").unlink()
    (folder / "model.onnx.data").unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")


def _swap_the_template(folder: Path) -> None:
    for path in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        text = path.read_text("utf-8")
        path.unlink()
        if path.suffix == ".jinja":
            text = "{% for message in messages %}swapped {{ message['content'] }}\n{% endfor %}"
        else:
            content = json.loads(text)
            if "chat_template" in content:
                content["chat_template"] = "{% for message in messages %}swapped {{ message['content'] }}\n{% endfor %}"
            text = json.dumps(content)
        path.write_text(text, "utf-8")


def _truncate_the_vocabulary(checkpoint: Path, directory: Path) -> Path:
    """Copy a checkpoint without the last 32 rows of its embedding."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, directory)
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:-32].contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["vocab_size"] -= 32
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _commit(registry: ModelRegistry, manifest: Manifest, name: str, folders: dict[str, Path]) -> Manifest:
    variants = [stored_variant(registry, folder, precision) for precision, folder in folders.items()]
    version, is_new = registry.commit(name, manifest.source, manifest.builder, variants)
    assert is_new
    return version


@pytest.mark.slow
def test_text_and_format_of_the_answers_are_judged_and_nothing_is_built_for_it_again(
    slmops: Slmops, tiny: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40, "utf-8")
    deploying = ("deploy", tiny, "--name", "home", *INT8, "--text", text)
    variant = variant_of(slmops.json(*deploying), "int8")
    assert variant["metrics"]["text_perplexity"] > 1
    assert variant["intervals"]["text_perplexity_ratio"]["value"] == pytest.approx(1, abs=0.2)
    assert {"text_top1_agreement", "text_kl_divergence"} <= {check["name"] for check in variant["gate"]["checks"]}
    again = slmops.run(*deploying)
    assert "unchanged" in again.stdout
    assert "reference" not in again.stderr  # nothing is left to compare with it

    # Answers in another format than is asked for now are rejected, or reported if the source's lack it too.
    asked = (*deploying, "--output-regex", r"\{.*\}")
    report = slmops.json(*asked, status=3, SLMOPS_GATE__MIN_OUTPUT_CONFORMITY="0.95")
    assert report["version"] == 1
    check = failed_checks(variant_of(report, "int8"))["output_format"]
    assert check["value"] < check["threshold"] == 0.95
    as_the_source = variant_of(slmops.json(*asked), "int8")
    assert as_the_source["status"] == "registered"
    assert any("lack the output format, like the source checkpoint's" in text for text in as_the_source["warnings"])
    evaluation = tmp_path / "eval.jsonl"
    row = {"id": 1, "messages": [{"role": "user", "content": "Hello"}], "expected": "no such answer"}
    evaluation.write_text(json.dumps(row) + "\n")
    passed = slmops.json("regate", "home@1", "--eval", evaluation, "--output-regex", "(?s).*")
    assert passed["status"] == "registered"


@pytest.mark.slow
def test_what_the_checkpoint_s_files_say_of_decoding_is_kept_and_judged_by(slmops: Slmops, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "qwen2")
    tokens = {
        token["content"]: token["id"]
        for token in json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    }
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    for name, values in (("config.json", {}), ("generation_config.json", sampling)):
        said = json.loads((checkpoint / name).read_text("utf-8"))
        said |= {"eos_token_id": tokens["<|endoftext|>"], **values}  # the base's, as fine-tuning leaves it
        (checkpoint / name).write_text(json.dumps(said), "utf-8")
    report = slmops.json("deploy", checkpoint, "--name", "home", *INT8)
    folder = slmops.home / "foundry" / "models" / "custom" / "home-int8" / "v1"
    written = json.loads((folder / "genai_config.json").read_text("utf-8"))
    assert {name: written["search"][name] for name in sampling} == sampling
    assert set(written["model"]["eos_token_id"]) == {tokens["<|im_end|>"], tokens["<|endoftext|>"]}
    (ends, samples) = report["warnings"]
    assert "tokenizer: <|im_end|>" in ends
    assert "temperature 0.7" in samples
    assert "ended_answers" in {check["name"] for check in variant_of(report, "int8")["gate"]["checks"]}
    assert slmops.json("deploy", checkpoint, "--name", "home", *INT8)["status"] == "unchanged"


@pytest.mark.slow
def test_nan_logits_are_named(slmops: Slmops, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "qwen2", tied=False)
    model = build_genai_model(checkpoint, tmp_path / "model")
    broken = onnx.load(model / "model.onnx")
    tensor = next(tensor for tensor in broken.graph.initializer if "layers.0" in tensor.name and len(tensor.dims) == 2)
    tensor.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), np.nan), tensor.name))
    (model / "model.onnx.data").unlink()
    onnx.save(broken, model / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    report = slmops.json("deploy", model, "--name", "broken", status=3)
    (variant,) = report["variants"]
    assert "finite_logits" in failed_checks(variant)
