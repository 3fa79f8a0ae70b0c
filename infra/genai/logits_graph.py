"""The decoder's graph with the logits of all positions, of a model that was built to give only the last one's."""

from pathlib import Path

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.records import Untyped


def give_all_positions(config: Untyped, model_dir: Path) -> bytes | None:
    """Let a runtime's `og.Config` of a model folder open the graph with all positions, where there is one.

    Returns the graph, which must be kept until the model is open: the runtime refers to it.
    """
    settings: Untyped = read_json(model_dir / "genai_config.json")
    file = settings["model"]["decoder"]["filename"]
    graph = _graph_with_all_positions(model_dir / file)
    if graph:
        config.add_model_data(file, graph)
    return graph


def _graph_with_all_positions(path: Path) -> bytes | None:
    """Return a decoder's ONNX graph whose `logits` are those of all positions, over the same external weights.

    The builder's `prune_lm_head` selects the last position's hidden state before lm_head, by a Gather and an Unsqueeze;
    both are left out. None for a graph that was not built so. Raises protobuf's errors for a file that is no graph.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    shapes = {entry.name: entry.type.tensor_type.shape for entry in (*model.graph.input, *model.graph.output)}
    if not {"input_ids", "logits"} <= shapes.keys() or shapes["logits"].dim[1].dim_value != 1:
        return None
    selection = _selection(model.graph)
    if selection is None:
        return None
    gather, unsqueeze = selection
    for node in model.graph.node:
        node.input[:] = [gather.input[0] if name == unsqueeze.output[0] else name for name in node.input]
    model.graph.node.remove(gather)
    model.graph.node.remove(unsqueeze)
    shapes["logits"].dim[1].CopyFrom(shapes["input_ids"].dim[1])
    del model.graph.value_info[:]  # those behind lm_head have changed; the runtime infers them
    content: bytes = model.SerializeToString()
    return content


def _selection(graph: Untyped) -> tuple[Untyped, Untyped] | None:
    """Return the Gather of the last position and the Unsqueeze of its result, the first ones back from `logits`."""
    makers = {name: node for node in graph.node for name in node.output}
    waiting = [makers["logits"]] if "logits" in makers else []
    for node in waiting:
        before = [makers[name] for name in node.input if name in makers]
        if [node.op_type, *(maker.op_type for maker in before[:1])] == ["Unsqueeze", "Gather"]:
            gather = before[0]
            if _constant(makers.get(gather.input[1])) == -1:
                return gather, node
        waiting += [maker for maker in before if not any(maker is known for known in waiting)]
    return None


def _constant(node: Untyped) -> object:
    """The number of a Constant node; None for another node or more numbers."""
    from onnx import numpy_helper

    if node is None or node.op_type != "Constant":
        return None
    value: object = numpy_helper.to_array(node.attribute[0].t).tolist()
    return value
