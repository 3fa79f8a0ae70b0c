"""Facts from the files of an onnxruntime-genai folder, read without opening the model."""

import json
from pathlib import Path

from slmops.infra.errors import BadInput

QUANTIZED = {4: "int4", 8: "int8"}


def detect_precision(folder: Path) -> str:
    """Return `int4`, `int8`, `fp16` or `fp32` from the ONNX graph: the bits of most quantized weights, else their type.

    Raises `BadInput` if the graph cannot be read or has neither.
    """
    import onnx

    config = json.loads((folder / "genai_config.json").read_text("utf-8"))
    path = folder / config["model"]["decoder"]["filename"]
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf raises its own kinds of errors
        raise BadInput(f"{path} is not a readable ONNX model: {error}.", "Save or copy it again.") from None
    bits = [
        attribute.i
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    ]
    if bits:
        most = max(set(bits), key=bits.count)
        if most in QUANTIZED:
            return QUANTIZED[most]
    sizes: dict[int, int] = {}
    for tensor in graph.initializer:
        count = 1
        for size in tensor.dims:
            count *= size
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + count
    names = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.FLOAT: "fp32"}
    largest = max(sizes, key=lambda kind: sizes[kind], default=0)
    if largest not in names:
        raise BadInput(f"The precision of {path} is not known.", "slmops deploys fp32, fp16, int8 and int4 models.")
    return names[largest]
