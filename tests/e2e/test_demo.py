"""The main job on the trained demo checkpoint: what the README's first command promises."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Slmops

pytestmark = pytest.mark.slow
Demo = tuple[Slmops, dict[str, Any]]

SDK_ALONE = """
import json, sys
from foundry_local_sdk import CatalogType, ChatSession, Configuration, FoundryLocalManager
from foundry_local_sdk import MessageItem, Request, RequestOptions, SearchOptions
from foundry_local_sdk.items import MessageRole
FoundryLocalManager.initialize(Configuration(app_name="someone-else", model_cache_dir=sys.argv[1],
                                             app_data_dir=sys.argv[2]))
catalog = FoundryLocalManager.instance.get_catalog(CatalogType.LOCAL)
ids = sorted(variant.id for model in catalog.list_models() for variant in model.variants)
model = catalog.get_model_variant(sys.argv[3])
model.load()
with ChatSession(model) as session:
    session.set_options(RequestOptions(search=SearchOptions(do_sample=False, max_output_tokens=64)))
    request = Request().add_item(MessageItem(MessageRole.USER, sys.argv[4]))
    with session.process_request(request) as response:
        text = "".join(part.text for item in response for part in getattr(item, "parts", [item]))
print(json.dumps({"ids": ids, "text": text}))
"""


def test_the_report_keeps_the_contract(demo: Demo) -> None:
    _, report = demo
    assert (report["name"], report["version"], report["status"]) == ("home", 1, "registered")
    assert report["aliases"] == ["champion"]
    assert report["foundry_model_id"] == "home:1"
    assert [variant["precision"] for variant in report["variants"]] == ["fp16", "int8", "int4"]
    sizes = [variant["size_bytes"] for variant in report["variants"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    for variant in report["variants"]:
        assert variant["status"] == "registered"
        assert variant["foundry_model_id"] == f"home-{variant['precision']}-generic-cpu:1"
        assert variant["gate"]["passed"]
        checks = {check["name"]: check for check in variant["gate"]["checks"]}
        assert {"top1_agreement", "kl_divergence", "quality_loss", "finite_logits"} <= set(checks)
        assert all({"name", "value", "threshold", "passed"} <= set(check) for check in checks.values())
        assert {
            "load_ms",
            "ttft_ms",
            "prompt_processing_throughput_tps",
            "token_generation_throughput_tps",
            "inter_token_latency_ms",
            "e2e_latency_ms",
            "peak_rss_bytes",
            "cpu_percent",
            "size_bytes",
        } <= set(variant["metrics"])
        assert len(variant["digest"]) == 64
        assert variant["uri"].startswith("file://")
        assert variant["recipe"] == f"cpu-{variant['precision']}"


def test_the_checkpoint_answers_held_out_commands(demo: Demo) -> None:
    slmops, report = demo
    assert report["reference_exact_match"] >= 0.95
    rows = [json.loads(line) for line in (slmops.home / "demo" / "eval.jsonl").read_text().splitlines()]
    assert len(rows) >= 100
    for variant in report["variants"]:
        answer = json.loads(variant["answer"])
        assert {"device", "action"} <= set(answer)


def test_the_second_run_is_unchanged(demo: Demo) -> None:
    slmops, first = demo
    again = slmops.json("demo")
    assert (again["status"], again["version"]) == ("unchanged", 1)
    assert [variant["digest"] for variant in again["variants"]] == [variant["digest"] for variant in first["variants"]]
    for before, after in zip(first["variants"], again["variants"], strict=True):
        assert after["metrics"]["kl_divergence"] == before["metrics"]["kl_divergence"]
        if before["reliable"]:  # figures that a busy machine falsified are measured again
            assert after["metrics"] == before["metrics"]


def test_another_process_with_the_sdk_alone_finds_loads_and_asks_it(demo: Demo, tmp_path: Path) -> None:
    slmops, report = demo
    directory = slmops.run("foundry-dir").stdout.strip()
    arguments = [directory, str(tmp_path / "data"), "home-int4-generic-cpu:1", report["question"]]
    done = subprocess.run(
        [sys.executable, "-c", SDK_ALONE, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=slmops.variables(),
    )
    answered = json.loads(done.stdout.splitlines()[-1])
    expected = {variant["foundry_model_id"] for variant in report["variants"]} | {"home:1"}
    assert set(answered["ids"]) == expected
    int4 = next(variant for variant in report["variants"] if variant["precision"] == "int4")
    assert answered["text"].strip() == int4["answer"].strip()


def test_the_model_folder_is_what_foundry_wants(demo: Demo) -> None:
    slmops, _ = demo
    folder = Path(slmops.run("foundry-dir").stdout.strip()) / "models" / "custom" / "home-int4" / "v1"
    assert not any(path.is_symlink() for path in folder.iterdir())
    described = json.loads((folder / "inference_model.json").read_text())
    assert described["Name"] == "home-int4-generic-cpu:1"
    assert described["PromptTemplate"]["prompt"] == ("<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n")
    assert set(described["ModelConfig"]) == {"max_length", "temperature", "top_p", "repetition_penalty"}


def test_list_show_and_logs_contain_it(demo: Demo) -> None:
    slmops, report = demo
    (model,) = slmops.json("list")["models"]
    assert (model["name"], model["version"], model["aliases"]) == ("home", 1, ["champion"])
    assert [variant["precision"] for variant in model["variants"]] == ["fp16", "int4", "int8"]
    shown = slmops.json("show", "home")
    assert shown["source"]["parameters"] == report["parameters"]
    assert {variant["precision"] for variant in shown["variants"]} == {"fp16", "int8", "int4"}
    assert "== int4: built in" in slmops.run("logs", "home@1").stdout
    assert "home@1" in slmops.run("list").stdout
    assert "# home@1" in (slmops.home / "reports" / "home@1.md").read_text()


def test_chat_answers_through_foundry(demo: Demo) -> None:
    slmops, report = demo
    done = slmops.run("chat", "home", text=f"{report['question']}\n\n")
    int4 = next(variant for variant in report["variants"] if variant["precision"] == "int4")
    assert done.stdout.strip() == int4["answer"].strip()


def test_a_stricter_gate_unregisters_and_the_usual_one_registers_again(demo: Demo) -> None:
    slmops, _ = demo
    rejected = slmops.json("regate", "home@1", "--max-kl-divergence", "0", status=3)
    assert rejected["status"] == "rejected"
    assert {variant["status"] for variant in rejected["variants"]} == {"rejected"}
    assert "home-int4-generic-cpu:1" not in slmops.run("unregister", "home@1").stdout
    restored = slmops.json("regate", "home@1")
    assert restored["status"] == "registered"
    assert all(variant["answer"] for variant in restored["variants"])
