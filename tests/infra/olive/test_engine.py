"""Builds through the real Olive engine, on tiny checkpoints: correct, small, reproducible, tidy."""

import ast
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.olive.engine import build
from slmops.infra.process.channel import QUIET_ENVIRONMENT
from slmops.infra.process.supervisor import run_in_child
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import logits_of
from tests.support.olive_builds import build_request

ROOT = Path(__file__).resolve().parents[3]
LONGER_THAN_ANY_WINDOW = [(7 * i * i + 13 * i) % 470 for i in range(200)]
PROMPTS = [LONGER_THAN_ANY_WINDOW, [3, 1, 4, 1, 5, 9, 2, 6], [480]]

WINDOW = 64
# Through Olive's engine, and with caches of several sizes; every family alone is in test_families.py.
REFERENCE_CASES = {
    "llama tied": ("llama", {"tied": True}),
    "mistral with a window": ("mistral", {"sliding_window": WINDOW}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "phi3 with a window": ("phi3", {"sliding_window": WINDOW}),
}
QUANTIZED_OPTIONS: list[dict[str, Any]] = [
    {"precision": "int8"},
    {"precision": "int8", "is_symmetric": False},
    {"precision": "int8", "algo_config": "rtn"},
    {"precision": "int4"},
    {"precision": "int4", "is_symmetric": False},
    {"precision": "int4", "algo_config": "k_quant"},
    {"precision": "int4", "algo_config": "k_quant_mixed"},
    {"precision": "int4", "algo_config": "k_quant", "is_symmetric": False},
    {"precision": "int4", "algo_config": "rtn_last"},
    {"precision": "int4", "extra_options": {"matmul_mixed_precision": {"last_matmul": "int8"}}},
    {"precision": "int4", "use_qdq": True},
    {"precision": "int4", "block_size": 64},
]


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (QUIET_ENVIRONMENT | {"OMP_NUM_THREADS": "2"}).items():
            patch.setenv(name, value)
        yield


def _build(checkpoint: Path, output: Path, **options: Any) -> Path:
    build(build_request(checkpoint, output, **options), lambda done, total, what: None)
    return output


def _reference_logits(checkpoint: Path, prompt: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].numpy()


def _generate(folder: Path, prompt: str, new_tokens: int) -> list[int]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    ids = og.Tokenizer(model).encode(prompt)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + new_tokens, min_length=len(ids) + new_tokens, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))[len(ids) :]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_fp32_agrees_with_transformers_at_every_position(case: str, tmp_path: Path) -> None:
    family, options = REFERENCE_CASES[case]
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", family, **options)
    folder = _build(checkpoint, tmp_path / "built", precision="fp32")
    for prompt in PROMPTS:
        expected = _reference_logits(checkpoint, prompt)
        for max_length in (len(prompt) + 1, 800):  # below and above any window: the cache's size changes nothing
            found = logits_of(folder, prompt, max_length)
            assert (found.argmax(-1) == expected.argmax(-1)).all()
            assert np.abs(found - expected).max() < 1e-3


@pytest.mark.parametrize("family", ["qwen3", "smollm3", "granite", "phi3", "mistral"])
def test_fp16_runs_on_the_cpu_and_stays_close(family: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", family)
    folder = _build(checkpoint, tmp_path / "built", precision="fp16")
    expected = _reference_logits(checkpoint, PROMPTS[0])
    assert np.abs(logits_of(folder, PROMPTS[0], 800) - expected).max() < 0.1  # the logits' spread is about 4
    session_options = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert session_options["provider_options"] == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", QUANTIZED_OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_quantized_builds_run_with_a_quantized_embedding(options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    import onnx

    hidden_size = 96 if options.get("block_size") == 64 else 128  # 96: no whole number of blocks, so rows are padded
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "qwen2", tied=tied, hidden_size=hidden_size)
    folder = _build(checkpoint, tmp_path / "built", **options)
    expected = _reference_logits(checkpoint, PROMPTS[0])
    error = np.abs(logits_of(folder, PROMPTS[0], 800) - expected).mean() / expected.std()
    assert error < (0.05 if options["precision"] == "int8" else 0.6)
    assert len(_generate(folder, "Turn on the lights", 8)) == 8
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    lookups = [node.op_type for node in graph.node if "input_ids" in node.input]
    assert "GatherBlockQuantized" in lookups
    assert "Gather" not in lookups
    scales = {node.input[2] for node in graph.node if node.op_type in {"MatMulNBits", "GatherBlockQuantized"}}
    assert not scales & {tensor.name for tensor in graph.initializer}  # they are restored from half of their bytes


def test_sizes_fall_with_the_precision_and_keep_the_promise(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(
        tmp_path / "checkpoint", "qwen2", hidden_size=256, intermediate_size=1024, num_hidden_layers=2, vocab_size=8192
    )
    size = {
        precision: (_build(checkpoint, tmp_path / precision, precision=precision) / "model.onnx.data").stat().st_size
        for precision in ("fp32", "fp16", "int8", "int4")
    }
    assert size["fp16"] <= 0.51 * size["fp32"]
    assert size["int8"] <= 0.28 * size["fp32"]
    assert size["int4"] <= 0.15 * size["fp32"]


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_two_builds_are_bit_identical_and_name_no_folder(precision: str, tmp_path: Path) -> None:
    first = make_tiny_checkpoint(tmp_path / "one" / "checkpoint", "qwen2")
    second = make_tiny_checkpoint(tmp_path / "another" / "place", "qwen2")
    built = [
        _contents(_build(checkpoint, checkpoint.parent / "built", precision=precision))
        for checkpoint in (first, second)
    ]
    assert built[0] == built[1]
    assert not [name for name, content in built[0].items() if str(tmp_path).encode() in content]


def test_a_child_builds_and_leaves_nothing_but_the_folder(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "llama", tied=False)
    before = _contents(checkpoint)
    home = tmp_path / "home"
    steps: list[str] = []
    result = run_in_child(
        build_request(checkpoint, tmp_path / "built", precision="int4", search={"temperature": 0.5}),
        deadline_s=300,
        log_path=tmp_path / "log",
        work_dir=tmp_path / "work",
        on_progress=lambda done, total, what: steps.append(what),
        environment={"HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "matplotlib")},
    )
    assert list(result.value.files) == sorted(_contents(tmp_path / "built"))
    assert {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json"} <= set(result.value.files)
    assert json.loads((tmp_path / "built" / "genai_config.json").read_text())["search"]["temperature"] == 0.5
    assert steps[-1] == "built"
    assert _contents(checkpoint) == before
    leftovers = [path for name in ("cache", "work", "home") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert leftovers == []


def test_a_further_olive_pass_runs_after_the_builder(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "qwen2")
    request = build_request(checkpoint, tmp_path / "built", precision="int4")
    request.olive_config["passes"]["peephole"] = {"type": "OnnxPeepholeOptimizer"}
    given = request.model_dump_json()
    result = build(request, lambda done, total, what: None)
    assert request.model_dump_json() == given
    assert {"genai_config.json", "model.onnx", "tokenizer.json"} <= set(result.files)
    assert "model_config.json" not in result.files
    assert len(_generate(tmp_path / "built", "Turn on the lights", 4)) == 4


def test_a_failing_builder_is_a_clear_error(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "qwen2")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(StageFailed, check=coded("olive-failed", "Error: ", "model.safetensors")):
        _build(checkpoint, tmp_path / "built", precision="int4")


def test_an_output_folder_in_use_is_refused(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "qwen2")
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "mine").write_text("mine")
    with pytest.raises(StageFailed, check=coded("output-folder-in-use")):
        _build(checkpoint, tmp_path / "built", precision="int4")


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_an_unsupported_architecture_is_refused(family: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", family)
    with pytest.raises(BadInput, check=coded("architecture-not-supported")):
        _build(checkpoint, tmp_path / "built", precision="int4")
    assert not (tmp_path / "built").exists()


IMPORTS_NOTHING_NEEDLESS = """
import sys
from slmops.infra.olive.lean_import import import_olive_workflows

run = import_olive_workflows().run
needless = [name for name in ("olive.cli", "scipy.signal", "matplotlib", "torchmetrics") if name in sys.modules]
import olive, torchmetrics
print(run.__module__, needless, olive.__version__, torchmetrics.Accuracy.__name__)
"""


def test_what_no_build_uses_is_not_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_NOTHING_NEEDLESS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["olive.workflows.run.run", "[]", version("olive-ai"), "Accuracy"]


@pytest.mark.parametrize(
    ("module", "imported"), [("__init__.py", "olive.cli.api"), ("evaluator/accuracy.py", "torchmetrics")]
)
def test_olive_itself_imports_it_still(module: str, imported: str) -> None:
    """If this fails, infra/olive/lean_import.py can be reduced."""
    spec = importlib.util.find_spec("olive")
    assert spec and spec.origin
    tree = ast.parse((Path(spec.origin).parent / module).read_text("utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert imported in names | {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
