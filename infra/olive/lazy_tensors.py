"""Tensors of an ONNX model that are computed while the model is written, so that not all are in memory."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

TensorType = tuple[str, Any, Sequence[int]]  # name, numpy dtype, shape


def computed_together(compute: Callable[[], Sequence[object]], types: Sequence[TensorType]) -> list[Any]:
    """Return an onnx-ir tensor per type; `compute` gives all their arrays when the first one is written.

    Each array is released after it is written. A tensor that is requested again is computed again.
    """
    import numpy as np
    import onnx_ir as ir

    waiting: dict[int, Any] = {}
    lock = threading.Lock()

    def take(index: int) -> Any:
        with lock:
            if index not in waiting:
                waiting.update(enumerate(compute()))
            return ir.tensor(waiting.pop(index))

    return [
        ir.LazyTensor(
            lambda index=index: take(index),
            dtype=ir.DataType.from_numpy(np.dtype(dtype)),
            shape=ir.Shape(shape),
            name=name,
        )
        for index, (name, dtype, shape) in enumerate(types)
    ]
