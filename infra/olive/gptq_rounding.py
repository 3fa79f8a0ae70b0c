"""GPTQ: round a matrix column by column; later columns compensate for the error of each one.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
arXiv:2210.17323. Columns are processed by the size of their inputs, largest first ("act order"). The scale of each
group is found before ("static groups"): the groups of the result are neighbouring columns. It is searched for, because
the smallest and the largest weight of a group seldom give the best grid.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olive.common.quant.utils import WeightQuantizer
    from torch import Tensor

ROUNDING = 5  # increased when the same weights and texts give other files; part of a build's key
VALUES_AT_ONCE = 2**20  # that are rounded to nearest, 4 MB: with four times as many it takes twice as long
# Grids that are tried for a group: its range, and its zero point, relative to those of its extreme weights.
RATIOS = (1.0, 1.03, 0.96, 0.92, 0.88, 0.84)
SHIFTS = (0, -1, 1)
COLUMNS_AT_ONCE = 128  # columns whose errors are passed to the others together, by one matrix product


@dataclass(frozen=True)
class Rounded:
    """A matrix [rows, columns] of unsigned bytes, and scales and zero points of its groups, [rows, groups]."""

    values: "Tensor"
    scales: "Tensor"
    zero_points: "Tensor"

    def parts(self, rows: Sequence[int]) -> Iterator["Rounded"]:
        """Yield consecutive parts with this number of rows."""
        split = (tensor.split([*rows]) for tensor in (self.values, self.scales, self.zero_points))
        for values, scales, zero_points in zip(*split, strict=True):
            yield Rounded(values, scales, zero_points)

    def restored(self) -> "Tensor":
        """Return the matrix in floating point."""
        groups = self.values.reshape(*self.scales.shape, -1)
        restored = (groups - self.zero_points[..., None]) * self.scales[..., None]
        return restored.reshape(self.values.shape)


def round_to_nearest(weight: "Tensor", quantizer: "WeightQuantizer") -> Rounded:
    """Round a matrix to nearest, in fp32; a part of its rows at a time: it may be an lm_head."""
    import torch

    parts = []
    for rows in weight.split(max(1, VALUES_AT_ONCE // weight.shape[1])):
        scales, zero_points = quantizer.find_qparams(rows.float())
        scales = as_stored(scales)
        parts.append((quantizer.quantize(rows.float(), scales, zero_points).to(torch.uint8), scales, zero_points))
    return Rounded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def as_stored(scales: "Tensor") -> "Tensor":
    """Return scales as the built model has them (`slmops.infra.olive.scales`), so that weights are rounded to these."""
    return scales.bfloat16().float()


def round_for_inputs(weight: "Tensor", products: "Tensor", quantizer: "WeightQuantizer", damping: float) -> Rounded:
    """Round a matrix [rows, columns] in fp32 so that its outputs stay close for inputs like the calibration inputs.

    `products` [columns, columns] are the sums of the inputs' products, x x^T, which this overwrites. `damping` is the
    share of their mean diagonal that is added to it.
    """
    import torch

    columns = weight.shape[1]
    scales, zero_points = find_grids(weight, products.diagonal(), quantizer)
    group_of = torch.arange(columns) // (quantizer.group_size if quantizer.group_size > 0 else columns)
    diagonal = products.diagonal()
    diagonal[diagonal == 0] = 1  # an input that never occurred: its column is rounded to nearest
    order = torch.argsort(diagonal, descending=True, stable=True)
    spread = _upper_factor_of_inverse(products[order][:, order], damping)
    # Transposed, so that a column is contiguous.
    left, values = weight.T[order].contiguous(), torch.empty_like(weight.T)
    scale_of, zero_of = scales.T[group_of[order]], zero_points.T[group_of[order]].to(weight.dtype)
    for start in range(0, columns, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, columns)
        errors = torch.empty_like(left[start:end])
        with _one_thread():
            for column in range(start, end):
                scale, zero = scale_of[column], zero_of[column]
                rounded = (left[column] / scale).add_(zero).round_().clamp_(quantizer.minq, quantizer.maxq)
                values[order[column]] = rounded
                error = left[column].sub(rounded.sub_(zero).mul_(scale)).div_(spread[column, column])
                errors[column - start] = error
                left[column + 1 : end].addr_(spread[column, column + 1 : end], error, alpha=-1)
        left[end:].addmm_(spread[start:end, end:].T, errors, alpha=-1)
    return Rounded(values.T.contiguous().to(torch.uint8), scales, zero_points)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: a column is too little for two, which would wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def find_grids(weight: "Tensor", importance: "Tensor", quantizer: "WeightQuantizer") -> "tuple[Tensor, Tensor]":
    """Return the scales and zero points, [rows, groups], of those tried whose rounding has the smallest error.

    Errors are squared and weighted by `importance` [columns], the sum of an input's squares.
    """
    import torch

    parts = []
    for rows in weight.split(max(1, VALUES_AT_ONCE // weight.shape[1])):
        scales, zero_points = (part.reshape(len(rows), -1) for part in quantizer.find_qparams(rows))
        groups, weights = rows.reshape(*scales.shape, -1), importance.reshape(scales.shape[1], -1)
        best, least = (as_stored(scales), zero_points), torch.full_like(scales, torch.inf)
        for ratio, shift in itertools.product(RATIOS, (0,) if quantizer.symmetric else SHIFTS):
            tried = (as_stored(scales * ratio), (zero_points + shift).clamp(quantizer.minq, quantizer.maxq))
            scale, zero = tried[0][..., None], tried[1][..., None]
            values = (groups / scale).add_(zero).round_().clamp_(quantizer.minq, quantizer.maxq)
            errors = (values.sub_(zero).mul_(scale).sub_(groups).square_() * weights).sum(-1)
            better = errors < least
            least = torch.where(better, errors, least)
            best = tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
        parts.append(best)
    return torch.cat([scales for scales, _ in parts]), torch.cat([zero_points for _, zero_points in parts])


def _upper_factor_of_inverse(products: "Tensor", damping: float) -> "Tensor":
    import torch

    products.diagonal().add_(damping * products.diagonal().mean())
    lower = torch.linalg.cholesky(products)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
