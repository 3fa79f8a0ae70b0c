"""The Muon optimizer, for the weight matrices of attention.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon. `torch.optim.Muon` multiplies in bfloat16 on every machine, which takes
seconds a step on a CPU without instructions for it; here the caller chooses the dtype.
"""

from collections.abc import Sequence
from typing import Any

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # of the post: it brings singular values near to 1 in the fewest steps
QUINTIC_STEPS = 3  # the post has 5; 3 train as well here
# The root mean square of AdamW's updates, so that both take similar learning rates: Liu et al., "Muon is Scalable for
# LLM Training", 2025, section 2.2.
UPDATE_RMS = 0.2


class Muon:
    """Updates matrices by their gradients' momentum, with all singular values brought near to 1.

    `weight_decay` is decoupled, as AdamW's is; `dtype` is torch's, of the products of matrices.
    """

    def __init__(self, weights: Sequence[Any], weight_decay: float, dtype: Any) -> None:
        import torch

        self._weights = list(weights)
        self._momenta = [torch.zeros_like(weight) for weight in weights]
        self._weight_decay = weight_decay
        self._dtype = dtype

    def step(self, learning_rate: float) -> None:
        """Update every weight by its gradient."""
        import torch

        with torch.no_grad():
            for weight, momentum in zip(self._weights, self._momenta, strict=True):
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                update = _orthogonalized(weight.grad.lerp(momentum, MOMENTUM).to(self._dtype))
                weight.mul_(1 - learning_rate * self._weight_decay)
                weight.add_(update.to(weight.dtype), alpha=-learning_rate * UPDATE_RMS * max(weight.shape) ** 0.5)


def _orthogonalized(matrix: Any) -> Any:
    """Return the matrix with singular values near to 1, by Newton and Schulz's iteration of a quintic."""
    import torch

    if matrix.shape[0] > matrix.shape[1]:
        return _orthogonalized(matrix.T).T
    a, b, c = QUINTIC
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(QUINTIC_STEPS):
        gram = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=b, alpha=c), matrix, beta=a)
    return matrix
