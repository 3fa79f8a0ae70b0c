"""Muon's updates."""

import pytest
import torch

from slmops.infra.transformers.muon import UPDATE_RMS, Muon


def _updated(weight: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float = 0.0) -> torch.Tensor:
    weight.grad = gradient
    before = weight.clone()
    Muon([weight], decay, torch.float32).step(rate)
    return weight - before


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (96, 96)])
def test_an_update_has_singular_values_of_one_size_and_an_rms_like_adamws(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    update = _updated(torch.zeros(shape), gradient, rate=1.0)
    before, after = (torch.linalg.svdvals(matrix) for matrix in (gradient, update))
    sizes = after / (UPDATE_RMS * max(shape) ** 0.5)
    assert sizes.median() == pytest.approx(1, abs=0.35)
    assert after[0] / after[len(after) // 2] < before[0] / before[len(before) // 2]
    assert (gradient * update).sum() < 0  # downhill
    assert update.square().mean().sqrt() == pytest.approx(UPDATE_RMS, rel=0.3)


def test_a_weight_decays_by_its_rate() -> None:
    weight = torch.ones(4, 8)
    assert _updated(weight, torch.zeros(4, 8), rate=0.5, decay=0.1) == pytest.approx(-0.05 * torch.ones(4, 8))
