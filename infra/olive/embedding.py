"""Quantize the embedding of an ONNX model, which onnxruntime-genai's builder leaves in floating point.

The builder (0.18) quantizes or shares an embedding only in four bits and only if it is tied to lm_head, because
`GatherBlockQuantized` had no other width. In ONNX Runtime 1.31 the operator also supports eight bits, and lm_head's
rows as `MatMulNBits` stores them. With a vocabulary of 152 k, that one tensor is half of an int8 model of 0.5 B
parameters.
"""

from dataclasses import dataclass
from typing import Any

from slmops.infra.olive.lazy_tensors import computed_together

ROWS_PER_STEP = 8192  # this much of the embedding is quantized at a time, so that the memory stays small


@dataclass(frozen=True)
class _Blocks:
    """A matrix in blocks along its rows: weights [rows, bytes a row], scales [rows, blocks], zero points or None."""

    weight: Any
    scales: Any
    zero_points: Any
    bits: int
    block_size: int
    width: int  # values per row, in whole blocks


def replace_embedding(model: Any, *, bits: int, block_size: int, tied: bool) -> bool:
    """Replace the float embedding of an onnx-ir model by a quantized one; True if there was one to replace.

    Where the embedding is `tied` to lm_head and lm_head is quantized, lm_head's weights serve both; otherwise the
    embedding is rounded to `bits` symmetrically in blocks of `block_size`, when the model is written.
    """
    graph = model.graph
    lookup = _float_lookup(graph)
    if lookup is None:
        return False
    embedding = lookup.inputs[0]
    lm_head = _quantized_lm_head(graph)
    if tied and lm_head:
        blocks = _lm_head_blocks(graph, lm_head)
    else:
        blocks = _rounded_blocks(graph, embedding, bits, block_size)
    _replace_lookup(graph, lookup, blocks)
    del graph.initializers[embedding.name]
    graph.sort()
    model.opset_imports.setdefault("com.microsoft", 1)
    return True


def _float_lookup(graph: Any) -> Any:
    """Return the `Gather` that looks `input_ids` up in a float initializer, or None."""
    for node in graph:
        if node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].name == "input_ids":
            table = node.inputs[0]
            return node if table.const_value is not None and table.dtype.is_floating_point() else None
    return None


def lm_head_bits(model: Any) -> int | None:
    """Return the width of an onnx-ir model's quantized lm_head, or None if it is in floating point."""
    node = _quantized_lm_head(model.graph)
    return int(node.attributes["bits"].as_int()) if node else None


def _quantized_lm_head(graph: Any) -> Any:
    """Return lm_head's node, or None if it is not quantized or is packed for one device."""
    node = next((n for n in graph if n.op_type == "MatMulNBits" and n.name.startswith("/lm_head/")), None)
    return None if node is None or "weight_prepacked" in node.attributes else node


def _lm_head_blocks(graph: Any, node: Any) -> _Blocks:
    bits, block_size, rows = (node.attributes[name].as_int() for name in ("bits", "block_size", "N"))
    weight, scales = node.inputs[1:3]
    zero_points = node.inputs[3] if len(node.inputs) > 3 else None
    blocks = weight.shape[1]
    return _Blocks(
        _reshaped(graph, weight, [rows, blocks * block_size * bits // 8]),
        _reshaped(graph, scales, [rows, blocks]),
        _reshaped(graph, zero_points, [rows, (blocks * bits + 7) // 8]) if zero_points is not None else None,
        bits,
        block_size,
        blocks * block_size,
    )


def _rounded_blocks(graph: Any, embedding: Any, bits: int, block_size: int) -> _Blocks:
    import numpy as np

    table = embedding.const_value
    rows, hidden_size = table.shape
    blocks = -(-hidden_size // block_size)
    width = blocks * block_size
    weight, scales = computed_together(
        lambda: _rounded(table.numpy(), bits, block_size),
        [
            (f"{embedding.name}_Q{bits}", np.uint8, (rows, width * bits // 8)),
            (f"{embedding.name}_scales", table.dtype.numpy(), (rows, blocks)),
        ],
    )
    return _Blocks(_initializer(graph, weight), _initializer(graph, scales), None, bits, block_size, width)


def _rounded(values: Any, bits: int, block_size: int) -> tuple[Any, Any]:
    """Round a table's rows symmetrically: weight = round(x / scale) + 2^(bits-1), scale = max|x| / (2^(bits-1) - 1)."""
    import numpy as np

    rows, hidden_size = values.shape
    blocks = -(-hidden_size // block_size)
    width = blocks * block_size
    weight = np.empty((rows, width * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), values.dtype)
    highest = 2 ** (bits - 1) - 1
    for start in range(0, rows, ROWS_PER_STEP):
        part = values[start : start + ROWS_PER_STEP].astype(np.float32)
        part = np.pad(part, ((0, 0), (0, width - hidden_size))).reshape(len(part), blocks, block_size)
        scale = np.abs(part).max(axis=2) / highest
        rounded = np.rint(part / np.where(scale == 0, 1, scale)[:, :, None]).astype(np.int16) + highest + 1
        unsigned = rounded.astype(np.uint8).reshape(len(part), width)
        # Two four-bit values per byte, the first in the lower half: the layout of GatherBlockQuantized.
        weight[start : start + len(part)] = unsigned if bits == 8 else unsigned[:, ::2] | unsigned[:, 1::2] << 4
        scales[start : start + len(part)] = scale
    return weight, scales


def _replace_lookup(graph: Any, lookup: Any, blocks: _Blocks) -> None:
    import onnx_ir as ir

    ids, looked_up = lookup.inputs[1], lookup.outputs[0]
    hidden_size = lookup.inputs[0].shape[1]
    inputs = [blocks.weight, ids, blocks.scales, *([blocks.zero_points] if blocks.zero_points is not None else [])]
    gather = ir.node(
        "GatherBlockQuantized",
        inputs,
        {"bits": blocks.bits, "block_size": blocks.block_size, "gather_axis": 0, "quantize_axis": 1},
        domain="com.microsoft",
        name="/model/embed_tokens/GatherBlockQuantized",
    )
    last, nodes = gather, [gather]
    if blocks.width != hidden_size:
        bounds = [
            _constant(f"/model/embed_tokens/{name}", [value])
            for name, value in (("start", 0), ("end", hidden_size), ("axis", -1))
        ]
        last = ir.node(
            "Slice", [gather.outputs[0], *(bound.outputs[0] for bound in bounds)], name="/model/embed_tokens/Slice"
        )
        nodes.extend([*bounds, last])
    graph.insert_before(lookup, nodes)
    name = looked_up.name
    looked_up.replace_all_uses_with(last.outputs[0])
    last.outputs[0].type, last.outputs[0].shape = looked_up.type, looked_up.shape
    graph.remove(lookup, safe=True)
    if last is not gather:
        gather.outputs[0].name = f"{gather.name}/output_0"
    last.outputs[0].name = name


def _reshaped(graph: Any, value: Any, shape: list[int]) -> Any:
    """Return `value` or a view of it in `shape`; the stored tensor stays that of lm_head."""
    import onnx_ir as ir

    if list(value.shape) == shape:
        return value
    target = _constant(f"{value.name}/embedding_shape", shape)
    node = ir.node("Reshape", [value, target.outputs[0]], name=f"{value.name}/embedding_view")
    node.outputs[0].name = f"{value.name}/embedding_view/output_0"
    node.outputs[0].dtype = value.dtype
    node.outputs[0].shape = ir.Shape(shape)
    graph.extend([target, node])
    return node.outputs[0]


def _constant(name: str, values: list[int]) -> Any:
    """Return a Constant node, from which ONNX Runtime infers shapes; it does not from a tensor in external data."""
    import onnx_ir as ir

    node = ir.node("Constant", [], {"value": ir.tensor(values, dtype=ir.DataType.INT64)}, name=name)
    node.outputs[0].name = f"{name}/output_0"
    return node


def _initializer(graph: Any, tensor: Any) -> Any:
    import onnx_ir as ir

    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
