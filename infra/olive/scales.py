"""Store the scales of quantized weights in bfloat16: ONNX Runtime's kernels for the CPU want them in fp32.

With blocks of 32, an fp32 scale costs one bit a weight, a fifth of a file in four bits. A `Cast` restores the scales.
ONNX Runtime folds it into a constant when it loads the model, so that speed and memory stay the same.
"""

from functools import partial
from typing import Any

from slmops.infra.olive.lazy_tensors import computed_together

SCALES = {"MatMulNBits": 2, "GatherBlockQuantized": 2}  # which input of an operator has the scales


def store_scales_in_half(model: Any) -> None:
    """Replace the fp32 scales of an onnx-ir model's quantized weights by casts from bfloat16, or from fp16 if exact.

    bfloat16 has the range of fp32, and 8 bits of precision: a weight moves by 0.016 of a grid's step at most in four
    bits, and by 0.25 in eight, where rounding moves it by 0.5. (fp16 fails for weights below 1e-3.)
    """
    import onnx_ir as ir

    graph = model.graph
    found = {
        node.inputs[at].name: node.inputs[at]
        for node in graph
        if (at := SCALES.get(node.op_type)) is not None and "weight_prepacked" not in node.attributes
    }
    for name, scales in found.items():
        if scales.const_value is None or scales.dtype != ir.DataType.FLOAT:
            continue
        half = _half_type(scales.const_value)
        (tensor,) = computed_together(
            partial(_halved, scales.const_value, half), [(f"{name}_half", half, tuple(scales.shape))]
        )
        stored = ir.Value(name=tensor.name, shape=scales.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(stored)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
        restored = cast.outputs[0]
        restored.name, restored.shape, restored.dtype = f"{name}/restored", scales.shape, ir.DataType.FLOAT
        graph.insert_before(graph[0], cast)
        scales.replace_all_uses_with(restored)
        del graph.initializers[name]


def _half_type(scales: Any) -> Any:
    """Return fp16 for scales that it alone represents exactly, such as those of a GPTQ checkpoint; else bfloat16."""
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir

    if isinstance(scales, ir.LazyTensor):
        return ml_dtypes.bfloat16
    values = scales.numpy()
    with np.errstate(over="ignore"):
        exact = (half for half in (ml_dtypes.bfloat16, np.float16) if (values.astype(half) == values).all())
        return next(exact, ml_dtypes.bfloat16)


def _halved(scales: Any, half: Any) -> list[Any]:
    return [scales.numpy().astype(half)]
