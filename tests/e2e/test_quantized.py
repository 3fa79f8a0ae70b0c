"""A checkpoint that another tool has quantized, deployed at its own precision and compared with its own numbers."""

from pathlib import Path

from tests.e2e.conftest import SMALL, SlmopsHere
from tests.support.quantized_checkpoints import quantized_as


def test_a_gptq_checkpoint_is_deployed_at_its_own_precision(tmp_path: Path, tiny: Path, server: str) -> None:
    checkpoint = quantized_as("gptq", tiny, tmp_path / "gptq")
    slmops = SlmopsHere(tmp_path / "home", {**SMALL, "PREFECT_API_URL": server})  # with the gate as users have it

    refused = slmops.run("deploy", checkpoint, "--name", "packed", "--precision", "int8", status=2)
    assert "can be built at int4 only" in refused.stderr
    report = slmops.json("deploy", checkpoint, "--name", "packed")

    (variant,) = report["variants"]
    assert (variant["precision"], variant["status"]) == ("int4", "registered")
    assert any("quantized already (gptq, 4 bits)" in warning for warning in report["warnings"])
    assert slmops.json("deploy", checkpoint, "--name", "packed")["status"] == "unchanged"
