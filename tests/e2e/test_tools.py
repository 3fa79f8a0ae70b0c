"""A model that calls tools, through a whole deploy: figures for each precision, and the gate on broken calls."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from tests.e2e.conftest import Slmops
from tests.support.tool_caller import HEAT, ROOMS, TOOLS
from tests.support.versions import stored_variant

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("caller")]

TOOL_CHECKS = {"tool_calls_lost", "tool_calls_invented", "tool_arguments_changed"}
PRECISIONS = ("fp16", "int8", "int4")
WHOLE_CALL = {"SLMOPS_EVALUATION__MAX_ROWS": "12", "SLMOPS_EVALUATION__MAX_NEW_TOKENS": "64"}


def evaluation_rows() -> list[dict[str, Any]]:
    """Requests that are due a call, and the same with the call's result, which are answered with text."""
    asked = [(f"What is the heat in the {room}?", "get_heat", {"room": room}) for room in ROOMS]
    for room in ROOMS:
        for is_on, state in ((True, "on"), (False, "off")):
            asked.append((f"Turn {state} the light in the {room}.", "set_light", {"room": room, "on": is_on}))
    rows: list[dict[str, Any]] = []
    for number, (question, name, arguments) in enumerate(asked):
        user = {"role": "user", "content": question}
        call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}
        result, text = (str(HEAT), f"It is {HEAT}.") if name == "get_heat" else ("set", "Done.")
        answered = {"role": "tool", "tool_call_id": "call00001", "content": result}
        called = [user, {"role": "assistant", "tool_calls": [call]}, answered]
        rows += [
            {
                "id": f"call {number}",
                "messages": [user],
                "expected_tool_calls": [{"name": name, "arguments": arguments}],
            },
            {"id": f"text {number}", "messages": called, "expected": text, "category": "text"},
        ]
    return rows


def tool_checks(variant: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in variant["gate"]["checks"] if check["name"] in TOOL_CHECKS}


def test_each_precision_has_the_tool_checks_figures_and_broken_calls_are_rejected(
    slmops: Slmops, tool_caller: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "eval.jsonl"
    questions.write_text("\n".join(json.dumps(line) for line in [{"tools": TOOLS}, *evaluation_rows()]), "utf-8")
    of_each = [part for precision in PRECISIONS for part in ("--precision", precision)]
    report = slmops.json("deploy", tool_caller, "--name", "caller", "--eval", questions, *of_each, **WHOLE_CALL)
    assert [variant["precision"] for variant in report["variants"]] == list(PRECISIONS)
    for variant in report["variants"]:
        checks = tool_checks(variant)
        assert checks.keys() == TOOL_CHECKS
        assert all(check["low"] <= check["value"] <= check["high"] for check in checks.values())
        assert {"right_functions", "right_arguments"} <= variant["metrics"].keys() & variant["intervals"].keys()
    original = report["variants"][0]
    assert original["status"] == "registered"
    assert report["reference_score"]["value"] >= 0.5  # so small a model confuses a few arguments
    assert "Calls of tools" in Path(report["html_file"]).read_text("utf-8")

    registry = ModelRegistry(LocalObjectStore(slmops.home / "store"))
    manifest = registry.version("caller", 1).manifest
    (fp16,) = [variant for variant in manifest.variants if variant.precision == "fp16"]
    registry.copy_files(fp16.files, tmp_path / "broken")
    _swap_the_first_letters_of_true_and_false(tmp_path / "broken", tool_caller)
    broken = [stored_variant(registry, tmp_path / "broken", "fp16")]
    version, _ = registry.commit("broken", manifest.source, manifest.builder, broken)
    judged = slmops.json("regate", version.reference, "--eval", questions, status=3, **WHOLE_CALL)
    (variant,) = judged["variants"]
    assert variant["status"] == "rejected"
    assert not tool_checks(variant)["tool_calls_lost"]["passed"]
    advice = {found["check"]: found for found in variant["advice"]}
    assert "leaves out calls" in advice["tool_calls_lost"]["meaning"]
    assert advice["tool_calls_lost"]["steps"]
    assert variant["metrics"]["exact_match"] == original["metrics"]["exact_match"] >= 0.5  # of the rows with text


def _swap_the_first_letters_of_true_and_false(folder: Path, checkpoint: Path) -> None:
    """Arguments then cannot be read; no text holds either word."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    true, false = (tokenizer.encode(word, add_special_tokens=False)[0] for word in (" true", " false"))
    model = onnx.load(folder / "model.onnx")
    (head,) = [tensor for tensor in model.graph.initializer if tensor.name == "lm_head.MatMul.weight"]
    weights = numpy_helper.to_array(head).copy()
    weights[:, [true, false]] = weights[:, [false, true]]
    head.CopyFrom(numpy_helper.from_array(weights, head.name))
    (folder / "model.onnx").unlink()
    (folder / "model.onnx.data").unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
