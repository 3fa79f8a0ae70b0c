"""The benchmarks' runner on a tiny model, without the peer: that it runs, and what it says. Figures decide nothing."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks import fidelity
from tests.benchmarks.bench import row_below, row_beside
from tests.benchmarks.llama_cpp import cache_folder, peer
from tests.benchmarks.random_checkpoint import SHAPES, write_random_checkpoint
from tests.benchmarks.rows_deploy import planned_row
from tests.benchmarks.rows_orchestration import covered_s
from tests.benchmarks.watching import FolderSize, folder_bytes, run_watched
from tests.conftest import unmeasured_environment
from tests.support.checkpoints import make_tiny_checkpoint

pytestmark = pytest.mark.runtime

ROOT = Path(__file__).resolve().parents[1]
CHEAP = ["build", "build-memory", "build-3b", "serving"]
CHEAP += ["bytes"] if sys.platform == "linux" else []


def run_targets(report: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.benchmarks.targets", "--tiny", "--without-peer", "--json", str(report)]
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=unmeasured_environment(), capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_runner_measures_each_row_of_builds_and_serving(tmp_path: Path) -> None:
    report = tmp_path / "deep" / "bench.json"
    done = run_targets(report, "--work", str(tmp_path), "--only", *CHEAP)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(report.read_text("utf-8"))
    assert {row["key"] for row in document["rows"]} == set(CHEAP) == set(document["seconds"])
    assert all(0 <= share <= 1 for share in document["others_cpu_share"].values())
    assert document["cores"] == os.cpu_count()
    assert document["versions"]["onnxruntime-genai"]
    assert document["peer"] is None
    assert document["tiny"] is True
    for row in document["rows"]:
        assert row["measured"] > 0 or row["key"] == "bytes", row  # some file systems count no reads
        assert row["what"] in done.stdout
    measured = {row["what"]: row for row in document["rows"]}
    assert measured["build fp16 + int8 + int4, wall"]["met"] is None, "there was no peer to be held beside"
    assert measured["int4 peak RSS when serving"]["met"] is not None
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}, "what it made to measure is gone"


def test_recipes_are_compared_by_their_distance_over_their_bytes(
    tmp_path: Path, torch_stays: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", hidden_size=128)
    options = ["--model", str(checkpoint), "--without-peer", "--without-speed", "--positions", "64", "--threads", "1"]
    page = tmp_path / "page.md"
    page.write_text(
        "Before.\n<!-- begin: python -m tests.benchmarks.fidelity -->\nold\n<!-- end -->\nBehind.\n", "utf-8"
    )
    files = ["--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "points.json"), "--write", str(page)]
    monkeypatch.setattr(sys, "argv", ["fidelity", *options, *files, "--recipes", "int4-rtn", "int4"])
    fidelity.main()
    rounded, calibrated = json.loads((tmp_path / "points.json").read_text("utf-8"))[str(checkpoint)]
    assert (rounded["variant"], calibrated["variant"]) == ("int4-rtn", "int4")
    assert calibrated["kl_divergence"] < rounded["kl_divergence"]
    assert "| slmops | `int4` |" in capsys.readouterr().out
    told = page.read_text("utf-8")
    assert "| slmops | `int4` |" in told and "old" not in told
    assert told.startswith("Before.\n" + fidelity.MARKS[0]) and told.endswith(fidelity.MARKS[1] + "Behind.\n")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_row_that_is_unknown_is_refused(tmp_path: Path) -> None:
    done = run_targets(tmp_path / "bench.json", "--only", "builds")
    assert done.returncode == 2
    assert "build-memory" in done.stderr


def test_a_target_is_judged_in_its_direction() -> None:
    def beside(measured: float, peer: float | None, **target: float) -> bool | None:
        return row_beside("key", "what", measured, "s", peer=peer, peer_name="peer", **target).met

    assert beside(20, 10, at_most=2) is True
    assert beside(21, 10, at_most=2) is False
    assert beside(9, 10, at_least=0.9) is True
    assert beside(8, 10, at_least=0.9) is False
    assert beside(8, None, at_least=0.9) is None
    assert beside(8, 10) is None
    assert row_below("key", "what", 5, "s", 5).met is True
    assert row_below("key", "what", 5.1, "s", 5).met is False


def test_a_plan_is_held_beside_what_happened_in_both_directions() -> None:
    assert [planned_row("key", "what", planned, 100).met for planned in (70, 80, 100, 120, 130)] == [
        False, True, True, True, False
    ]  # fmt: skip


def test_what_cannot_be_measured_is_told_and_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    report, row = tmp_path / "bench.json", {"key": "clients", "what": "known"}
    report.write_text(json.dumps({"rows": [row], "seconds": {"clients": 3}}), "utf-8")
    nowhere = {"XDG_CACHE_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "tests.benchmarks.targets", "--without-peer", "--json", str(report), "--resume"]
    done = subprocess.run(
        [*command, "--only", "clients", "deploy-smollm2"],
        cwd=ROOT,
        env={**unmeasured_environment(), **nowhere},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(report.read_text("utf-8"))
    assert document["rows"] == [row]
    assert set(document["not_measured"]) == {"deploy-smollm2"}
    assert "deploy-smollm2 was not measured: " in done.stdout


def test_stages_that_overlap_count_once() -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)

    def between(start: float, end: float) -> tuple[datetime, datetime]:
        return begin + timedelta(seconds=start), begin + timedelta(seconds=end)

    assert covered_s([]) == 0
    assert covered_s([between(0, 2), between(5, 6)]) == 3
    assert covered_s([between(1, 4), between(0, 2), between(2, 3)]) == 4


def test_a_checkpoint_written_by_shards_is_one_that_transformers_loads(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "sharded", {"num_hidden_layers": 3}, shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 3
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_checkpoint_of_one_shard_needs_no_index(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "one", SHAPES["tiny"])
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]


def test_the_peak_of_a_command_is_its_own(tmp_path: Path) -> None:
    held = bytearray(300_000_000)  # of this process: not to be seen in the command's
    held[::4096] = b"x" * len(held[::4096])
    small = run_watched([sys.executable, "-c", "import time; time.sleep(1)"], log=tmp_path / "log")
    program = "import time; held = b'x' * 150_000_000; time.sleep(1); print('done')"
    large = run_watched([sys.executable, "-c", program], log=tmp_path / "log")
    assert small.peak_rss_bytes < 100_000_000
    assert 150_000_000 < large.peak_rss_bytes < 250_000_000
    assert large.output.strip() == "done"
    assert large.seconds > 0.3


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        run_watched([sys.executable, "-c", "raise SystemExit('no such model')"], log=tmp_path / "log")


def test_files_that_come_and_go_are_counted(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"x" * 1000)
    os.link(tmp_path / "kept", tmp_path / "linked")
    assert folder_bytes(tmp_path) == 1000
    with FolderSize(tmp_path) as largest:
        (tmp_path / "kept-too").write_bytes(b"x" * 500)
    assert largest.peak_bytes == 1500


def test_without_its_source_there_is_no_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not cache_folder().is_relative_to(tmp_path):
        pytest.skip("Windows and macOS have another place for caches, which is the user's own")
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path)}
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    assert peer() is None
    printed = capsys.readouterr().out
    assert "could not be built, and the rows have no peer: " in printed
    assert "llama-cpp-python" in printed.partition("no peer: ")[2]
