"""A real model, SmolLM2-135M-Instruct, from its GGUF file to an answer of Foundry Local by the calibrated int4."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, SlmopsHere
from tests.support.real_models import real_model

QUESTIONS = {
    "What is the capital of France?": "Paris",
    "Name a fruit that is red.": "apple",
    "What do bees make?": "honey",
    "What is 2 + 2?": "4",
}
# A tenth of the texts that a deploy calibrates on.
LITTLE = {"SLMOPS_CALIBRATION__MAX_TOKENS": "400", "SLMOPS_CALIBRATION__MAX_NEW_TOKENS": "32"}


@pytest.mark.timeout(1800)  # it takes three minutes on two cores
def test_a_real_models_gguf_file_is_deployed_at_int4_once_and_answers_through_foundry(
    tmp_path: Path, server: str
) -> None:
    """With the gate as users have it."""
    rows = [
        {"id": text, "messages": [{"role": "user", "content": text}], "expected": answer, "scorer": "contains"}
        for text, answer in QUESTIONS.items()
    ]
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    slmops = SlmopsHere(tmp_path / "home", {**SMALL, **LITTLE, "PREFECT_API_URL": server})
    deploy = ("deploy", real_model("smollm2.gguf"), "--name", "smol", "--precision", "int4", "--eval", evaluation)

    report = slmops.json(*deploy)

    (variant,) = report["variants"]
    assert (variant["status"], variant["recipe"]) == ("registered", "cpu-int4")
    assert variant["metrics"]["kl_divergence"] <= 0.10
    assert variant["size_bytes"] <= 0.21 * 4 * report["parameters"]
    assert any("quantized already (Q4_1)" in warning for warning in report["warnings"])
    # "The capital of France is Paris.", or, on a processor that rounds otherwise, what the source nearly says too.
    assert variant["answer"]
    assert slmops.json(*deploy)["status"] == "unchanged"
