"""Calibrated quantization: the gain of GPTQ over rounding, and its builds in each family."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from slmops.infra.olive.calls import Build
from slmops.infra.olive.engine import build
from slmops.infra.olive.gptq_rounding import Rounded, as_stored, find_grids, round_for_inputs, round_to_nearest
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.recipes import load_recipe
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.genai_models import logits_of

if TYPE_CHECKING:
    from olive.common.quant.utils import WeightQuantizer

DAMPING = 0.01
ROWS, COLUMNS, GROUP = 24, 320, 32  # more columns than are taken at once


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """Return inputs [n, COLUMNS] that are correlated and of different size, like those of a trained model."""
    random = torch.Generator().manual_seed(1)
    mixed = torch.randn(2000, 40, generator=random) @ torch.randn(40, COLUMNS, generator=random)
    noise = torch.randn(2000, COLUMNS, generator=random)
    return (mixed + noise) * torch.linspace(0.1, 3, COLUMNS)


def quantizer_of(symmetric: bool) -> "WeightQuantizer":
    from olive.common.quant.utils import WeightQuantizer  # takes more than a second to import

    return WeightQuantizer(4, symmetric, GROUP)


def column_by_column(weight: torch.Tensor, products: torch.Tensor, quantizer: "WeightQuantizer") -> torch.Tensor:
    """Return GPTQ's values as its paper writes it (algorithm 1), without blocks, in the order of the inputs' size."""
    scales, zeros = find_grids(weight, products.diagonal(), quantizer)
    order = torch.argsort(products.diagonal(), descending=True, stable=True)
    permuted = products[order][:, order].double()
    permuted += DAMPING * permuted.diagonal().mean() * torch.eye(len(permuted), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(permuted), upper=True)
    left, values = weight[:, order].double(), torch.empty(weight.shape, dtype=torch.int32)
    for step, column in enumerate(order.tolist()):
        scale, zero = scales[:, column // GROUP].double(), zeros[:, column // GROUP]
        rounded = (left[:, step] / scale + zero).round().clamp(quantizer.minq, quantizer.maxq)
        values[:, column] = rounded.int()
        error = (left[:, step] - (rounded - zero) * scale) / factor[step, step]
        left[:, step + 1 :] -= error[:, None] * factor[step, step + 1 :][None]
    return values


@pytest.mark.parametrize("symmetric", [False, True])
class TestRounding:
    def error(self, found: Rounded, weight: torch.Tensor, inputs: torch.Tensor) -> float:
        return float((inputs @ (found.restored() - weight).T).square().mean())

    def test_outputs_stay_nearer_than_by_rounding_to_nearest(
        self, weight: torch.Tensor, inputs: torch.Tensor, symmetric: bool
    ) -> None:
        quantizer = quantizer_of(symmetric)
        found = round_for_inputs(weight, inputs.T @ inputs, quantizer, DAMPING)
        plain = round_to_nearest(weight, quantizer)
        assert self.error(found, weight, inputs) < 0.3 * self.error(plain, weight, inputs)
        assert found.values.min() >= 0
        assert found.values.max() <= 15

    def test_the_walk_in_blocks_is_the_papers_walk(
        self, weight: torch.Tensor, inputs: torch.Tensor, symmetric: bool
    ) -> None:
        quantizer = quantizer_of(symmetric)
        found = round_for_inputs(weight, inputs.T @ inputs, quantizer, DAMPING)
        wanted = column_by_column(weight, inputs.T @ inputs, quantizer)
        assert (found.values != wanted).float().mean() < 0.01  # ties that fp32 rounds otherwise

    def test_a_groups_grid_has_a_smaller_error_than_that_of_its_extremes(
        self, weight: torch.Tensor, inputs: torch.Tensor, symmetric: bool
    ) -> None:
        quantizer = quantizer_of(symmetric)
        importance = inputs.square().sum(0)

        def errors(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
            rounded = Rounded(quantizer.quantize(weight, scales, zeros), scales, zeros).restored()
            return ((rounded - weight).square() * importance).reshape(*scales.shape, -1).sum(-1)

        scales, zeros = quantizer.find_qparams(weight)
        plain, found = errors(as_stored(scales), zeros), errors(*find_grids(weight, importance, quantizer))
        assert (found <= plain * (1 + 1e-5)).all()
        assert found.sum() < 0.95 * plain.sum()

    def test_a_column_whose_input_was_never_seen_keeps_its_nearest_values(
        self, weight: torch.Tensor, inputs: torch.Tensor, symmetric: bool
    ) -> None:
        dead = inputs.clone()
        dead[:, 7] = 0
        quantizer = quantizer_of(symmetric)
        found = round_for_inputs(weight, dead.T @ dead, quantizer, DAMPING)
        scales, zeros = found.scales, found.zero_points
        assert (found.values[:, 7] == quantizer.quantize(weight, scales, zeros)[:, 7]).all()


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tied": False},
    "qwen3": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "phi3": {},
    "gemma3": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.runtime
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_calibrated_layer_by_layer_and_runs(family: str, tmp_path: Path) -> None:
    """Each layer has its own mask and rotary embedding, and its texts are longer than the window."""
    from transformers import AutoModelForCausalLM

    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", family, **FAMILIES[family])
    recipe = load_recipe("int4-mixed")
    call = Build(
        olive_config=olive_run_config(recipe),
        checkpoint_dir=checkpoint,
        output_dir=tmp_path / "model",
        cache_dir=tmp_path / "cache",
        threads=1,
        calibration=tuple(tuple((7 * i * i + 11 * i + row) % 470 for i in range(100)) for row in range(4)),
    )
    steps: list[str] = []
    build(call, lambda done, total, what: steps.append(what))
    assert f"calibrating layer 2 of {FAMILIES[family].get('num_hidden_layers', 2)}" in steps
    prompt = [(5 * i * i + 3 * i) % 470 for i in range(120)]
    found = torch.tensor(logits_of(tmp_path / "model", prompt, 121))
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")(torch.tensor([prompt])).logits[0]
    assert (found - wanted).std() < 0.25 * wanted.std()


def test_texts_and_matrices_are_worked_on_side_by_side_without_another_result(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint")
    texts = tuple(tuple((7 * i * i + 11 * i + row) % 470 for i in range(60)) for row in range(6))
    weights = []
    before = torch.get_num_threads()
    try:
        for threads in (3, 1):
            torch.set_num_threads(threads)
            build(
                Build(
                    olive_config=olive_run_config(load_recipe("int4")),
                    checkpoint_dir=checkpoint,
                    output_dir=tmp_path / f"model{threads}",
                    cache_dir=tmp_path / f"cache{threads}",
                    threads=threads,
                    calibration=texts,
                ),
                lambda done, total, what: None,
            )
            weights.append((tmp_path / f"model{threads}/model.onnx.data").read_bytes())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert weights[0] == weights[1]
