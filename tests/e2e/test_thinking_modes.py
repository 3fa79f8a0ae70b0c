"""A model whose template has a switch of thoughts, deployed once: judged in both modes, and under an output schema."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.infra.process.channel import QUIET_ENVIRONMENT
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.exams.constraint import RESPONSE_FORMAT, ResponseFormat
from tests.e2e.conftest import Slmops

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("caller")]


# Another program on the same machine: the SDK alone.
REGISTERED = """
import sys
from foundry_local_sdk import Configuration, FoundryLocalManager
from foundry_local_sdk.catalog import CatalogType
cache_dir, own_dir = sys.argv[1:]
FoundryLocalManager.initialize(Configuration(app_name="other", model_cache_dir=cache_dir, app_data_dir=own_dir))
info = FoundryLocalManager.instance.get_catalog(CatalogType.LOCAL).get_model_variant("caller-int8-generic-cpu:1").info
names = "capabilities reasoning_start reasoning_end tool_call_start tool_call_end display_name license"
print(*(info.get_string_property(name) for name in names.split()), info.supports_tool_calling, info.max_output_tokens)
"""


def test_one_deploy_judges_both_modes_and_a_constraint(slmops: Slmops, tool_caller: Path, tmp_path: Path) -> None:
    rows = [
        {"id": n, "messages": [{"role": "user", "content": f"Turn on light {n}."}], "expected": "Done."} for n in "ab"
    ]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    checkpoint = shutil.copytree(tool_caller, tmp_path / "checkpoint")
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A caller\n", "utf-8")
    asked = ("deploy", checkpoint, "--name", "caller", "--eval", tmp_path / "eval.jsonl", "--precision", "int8")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["on", "off"]}', "utf-8")
    constrained = ("--output-schema", schema, "--constrain")
    report = slmops.json(
        *asked, *constrained, "--thinking", "both", "--max-thought-tokens", "8", SLMOPS_SOAK__REQUESTS="0"
    )
    (variant,) = report["variants"]
    modes = [check.get("thinking") for check in variant["gate"]["checks"] if check["name"] == "quality_loss"]
    assert modes == [True, False]
    assert {"score_with_thoughts", "score_without_thoughts"} <= variant["metrics"].keys() & variant["intervals"].keys()
    assert "With and without thoughts" in Path(report["html_file"]).read_text("utf-8")
    assert variant["metrics"]["constrained_conformity"] == 1
    version = ModelRegistry(LocalObjectStore(slmops.home / "store")).version("caller", 1)
    assert version.latest(RESPONSE_FORMAT) == ResponseFormat(json_schema={"enum": ["on", "off"]})
    arguments = (sys.executable, "-c", REGISTERED, slmops.home / "foundry", tmp_path / "own")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **QUIET_ENVIRONMENT}
    told = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    marks = "<think> </think> <tool_call> </tool_call>"
    assert told.splitlines()[-1] == f"tool-calling,reasoning {marks} caller int8 apache-2.0 True 2048"
