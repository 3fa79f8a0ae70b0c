"""Make onnxruntime-genai's builder quantize each weight when it is written, instead of the whole model in advance.

The builder (0.18) turns its model into a protobuf message with all weights in fp32, quantizes that, and turns the
result into a model again: a 0.5 B model takes 5 GB. Here the same quantizer of ONNX Runtime takes one weight at a time,
with the same result to the bit (tests/infra/olive/test_streamed_quantization.py), and memory grows with the largest
weight.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from slmops.infra.olive.lazy_tensors import TensorType, computed_together
from slmops.infra.olive.memory import mapped_bytes, release_mapped_pages

FLOATS = ("float16", "float32", "bfloat16")
OF_FOUR_BIT_TYPES = (21, 10)  # operator set and IR version of the quantizer's result
VALUES_PER_STEP = 4 * 2**20
MAX_BYTES_READ_AND_HELD = 64 * 2**20
WRITERS = 4  # a weight's values and scales are written together: two weights are in progress
MAX_BYTES_WRITTEN_AT_ONCE = 32 * 2**20  # a larger tensor is written alone


@contextlib.contextmanager
def streamed_quantization(builder: Any, finish: Callable[[Any], None]) -> Iterator[None]:
    """Patch `builder`, the module `onnxruntime_genai.models.builder`, for models that are made in this context.

    `finish` is called with a quantized model (onnx-ir) before it is written, and may change it.
    """
    base = next(kind for kind in builder.LlamaModel.__mro__ if "to_nbits" in vars(kind))
    to_nbits = base.to_nbits

    def to_nbits_when_written(self: object) -> Any:
        model = _quantized_when_written(self) if _can_stream(self) else to_nbits(self)
        finish(model)
        return model

    base.to_nbits = to_nbits_when_written
    try:
        with _written_side_by_side():
            yield
    finally:
        base.to_nbits = to_nbits


def _can_stream(model: Any) -> bool:
    """Whether a builder's model can be streamed: one width, ONNX Runtime's default quantizer, MatMulNBits."""
    special = (
        model.quant_attrs["use_qdq"],
        model.matmul_attrs["weights_prepacked"],
        getattr(model, "exact_quant_override_names", None),
        getattr(model, "int4_customized_weight_config", None),
    )
    return (
        not any(special)
        and model.quantization_algo == "default"
        and set(model.quant_attrs["op_types_to_quantize"]) <= {"MatMul", "Gather"}
        and (model.model.opset_imports[""], model.model.ir_version) >= OF_FOUR_BIT_TYPES
        and not any(_is_beyond(node, model.quant_attrs) for node in model.model.graph)
        and all(len(weight.shape) == 2 for _, weight in _weights(model))
    )


def _is_beyond(node: Any, quant: dict[str, Any]) -> bool:
    """Whether the quantizer would do more with a node: enter its graph, or quantize its lookup table."""
    if any(attribute.type.name.startswith("GRAPH") for attribute in node.attributes.values()):
        return True
    looks_up = node.op_type == "Gather" and node.inputs[0].const_value is not None
    return looks_up and quant["bits"] == 4 and "Gather" in quant["op_types_to_quantize"]


def _weights(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the MatMul nodes that are to be quantized, each with its weight's value."""
    excluded = set(model.quant_attrs["nodes_to_exclude"])
    for node in model.model.graph:
        if node.op_type == "MatMul" and node.name not in excluded:
            weight = node.inputs[1]
            if weight.const_value is not None and weight.const_value.dtype.numpy().name in FLOATS:
                yield node, weight


def _quantized_when_written(model: Any) -> Any:
    import onnx_ir as ir

    graph, quant = model.model.graph, model.quant_attrs
    for node, weight in list(_weights(model)):
        tensors = _quantized_tensors(weight, quant)
        for tensor in tensors:
            model.make_initializer(tensor, tensor.name)
        attributes = {
            "K": weight.shape[0],
            "N": weight.shape[1],
            **({"accuracy_level": quant["accuracy_level"]} if quant["accuracy_level"] else {}),
            "bits": quant["bits"],
            "block_size": quant["matmul_block_size"],
        }
        product = node.outputs[0]
        replacement = ir.node(
            "MatMulNBits",
            [node.inputs[0], *(model.make_value(tensor.name) for tensor in tensors)],
            attributes,
            domain="com.microsoft",
            name=f"{node.name}_Q{quant['bits']}",
        )
        graph.insert_before(node, replacement)
        name, replaced = product.name, replacement.outputs[0]
        replaced.type, replaced.shape = product.type, product.shape
        product.replace_all_uses_with(replaced, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        replaced.name = name
        if not weight.uses():
            del graph.initializers[weight.name]
    model.model.opset_imports.setdefault("com.microsoft", 1)
    return model.model


def _quantized_tensors(weight: Any, quant: dict[str, Any]) -> list[Any]:
    """Return `MatMulNBits`' tensors for a weight [K, N]: packed values, scales, and zero points if asymmetric."""
    import numpy as np
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    bits, block_size, name, source = quant["bits"], quant["matmul_block_size"], weight.name, weight.const_value
    quantizer = DefaultWeightOnlyQuantizer(
        DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=quant["is_symmetric"], bits=bits)
    )
    rows, columns = weight.shape
    blocks, values_per_byte = -(-rows // block_size), 8 // bits
    dtype = source.dtype.numpy()
    types: list[TensorType] = [
        (f"{name}_Q{bits}", np.uint8, (columns, blocks, block_size // values_per_byte)),
        (f"{name}_scales", dtype, (columns, blocks)),
    ]
    if not quant["is_symmetric"]:
        types.append((f"{name}_zero_points", np.uint8, (columns, -(-blocks // values_per_byte))))

    def quantize() -> list[Any]:
        values = source.numpy()
        made = [np.empty(shape, a_dtype) for _, a_dtype, shape in types]
        step = max(1, VALUES_PER_STEP // rows)
        for start in range(0, columns, step):  # blocks are within a column
            part = np.ascontiguousarray(values[:, start : start + step])
            if dtype.name == "bfloat16":  # which the quantizer does not accept
                part = part.astype(np.float32)
            for array, quantized in zip(made, quantizer.qbits_block_quant(part), strict=False):
                array[start : start + step] = quantized
        return made

    return computed_together(quantize, types)


@contextlib.contextmanager
def _written_side_by_side() -> Iterator[None]:
    """Write a model by several threads, with the same bytes, and release the pages of the checkpoint that were read.

    While one weight is quantized with the GIL held, the next ones are read and converted, and the last ones are
    written.
    """
    import onnx_ir as ir

    save = ir.save

    def save_and_release(*arguments: Any, callback: Any = None, **options: Any) -> None:
        before = mapped_bytes()

        def before_tensor(tensor: Any, info: Any) -> None:
            if mapped_bytes() - before > MAX_BYTES_READ_AND_HELD:
                release_mapped_pages()
            if callback:
                callback(tensor, info)

        save(
            *arguments,
            callback=before_tensor,
            max_workers=WRITERS,
            max_in_flight_bytes=MAX_BYTES_WRITTEN_AT_ONCE,
            **options,
        )

    ir.save = save_and_release
    try:
        yield
    finally:
        ir.save = save
