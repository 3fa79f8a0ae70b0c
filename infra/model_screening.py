"""The references that a model folder may have. They are checked before any runtime opens the folder, whatever its
origin.

onnxruntime-genai loads the library that `custom_ops_library` names, its providers load what their options name, and
onnxruntime reads any file that an ONNX graph refers to. Therefore this module lists everything that a folder may name,
and refuses anything else. The lists contain what the model builder writes, and options that only change speed.
"""

import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import read_regular

GENAI_CONFIG = "genai_config.json"

# Files that contain only data. The weights file of an ONNX graph may have another name.
DATA_SUFFIXES = frozenset(
    {
        *("", ".onnx", ".data", ".json", ".jsonl", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".safetensors"),
        *(".csv", ".tsv", ".yaml", ".yml", ".rtf", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".webp"),
    }
)
# This file directs the runtime to tokenizer files with other names and in other folders.
TOKENIZER_MODULE = "tokenizer_module.json"

# Operators of onnxruntime itself. Operators of other domains come from a library.
ONNX_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
# Those of them that contain machine code from a device's compiler, or name a file with it.
COMPILED_OPERATORS = frozenset({"EPContext", "Snpe"})
EXTERNAL_DATA_KEYS = frozenset({"location", "offset", "length", "checksum"})

# Execution providers, and their options that the model builder sets.
PROVIDER_OPTIONS = {
    "cpu": frozenset[str](),
    "cuda": frozenset({"enable_cuda_graph", "enable_skip_layer_norm_strict_mode"}),
    "dml": frozenset({"enable_graph_capture"}),
    "webgpu": frozenset({"enableGraphCapture", "multiRotaryCacheConcatOffset", "validationMode"}),
}

_WHAT_TO_DO = "Remove it from the folder if the model works without it, or deploy the model's checkpoint."


def screen_model(folder: Path) -> None:
    """Check an onnxruntime-genai folder without running any of it.

    Raises `BadInput` with the first thing in it that names code, a library, a file outside the folder or an option that
    is not on the lists, and for a link out of the folder, or a device or pipe in place of a file.
    """
    screen_files({path.name: path for path in _files_of(folder)})


def screen_files(files: Mapping[str, Path]) -> None:
    """Check files as `screen_model` does; `files` has the name of each, and the regular file with its content.

    Only files that `is_screened` accepts are read; the others need not exist.
    """
    if GENAI_CONFIG not in files:
        raise BadInput(
            f"The model has no {GENAI_CONFIG}.",
            "Give the whole folder that the model builder wrote.",
            code="genai-config-missing",
        )
    config = _genai_config(files[GENAI_CONFIG])
    decoder = config.model.decoder.filename
    if decoder is not None and decoder not in files:
        raise _refusal(f"{GENAI_CONFIG} names {decoder!r}, which is not a file of the folder")
    weights = {name for graph in files if graph.endswith(".onnx") for name in _weights_of(graph, files)}
    for name, path in files.items():
        if name == TOKENIZER_MODULE or (name not in weights and Path(name).suffix.lower() not in DATA_SUFFIXES):
            raise _refusal(f"{name} is a file of a kind that no model needs")
        if name.endswith("config.json") and name != GENAI_CONFIG:
            _check_tokenizer_config(name, path)


def is_screened(name: str) -> bool:
    """Whether `screen_files` reads the content of a file; it does not read weights."""
    return name.endswith((".onnx", "config.json"))


def _files_of(folder: Path) -> Iterator[Path]:
    """Yield the files directly in a folder; no listed entry can refer to a subfolder."""
    home = folder.resolve()
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not _is_inside(path.resolve(), home):
            raise _refusal(f"{path.name} is a symbolic link to {path.readlink()}, outside the folder")
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            yield path
        elif not stat.S_ISDIR(mode):
            raise _refusal(f"{path.name} is not a file but a device, a pipe or a socket")


def _is_inside(target: Path, home: Path) -> bool:
    """Whether a link's target is in a folder, or in the folder where Hugging Face's cache keeps its content."""
    snapshots = next((folder for folder in home.parents if folder.name == "snapshots"), None)
    cached = snapshots is not None and target.parent == snapshots.parent / "blobs"
    return target.exists() and (target.is_relative_to(home) or cached)


# genai_config.json


class _Section(BaseModel):
    """Part of genai_config.json; fields that are not declared are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _plain_name(name: str) -> str:
    if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|\0'):
        raise ValueError(f"{name!r} is not the plain name of a file in the folder")
    return name


def _onnx_name(name: str) -> str:
    if not name.endswith(".onnx"):  # onnxruntime reads a file with the ending .ort in another format
        raise ValueError(f"{name!r} is not an ONNX file")
    return _plain_name(name)


def _name_pattern(name: str) -> str:
    if "%" in name.replace("%d", "", 1):  # the runtime passes it to snprintf, with a layer's number
        raise ValueError(f"{name!r} is not the name of an input or output")
    return name


def _provider(entry: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    for name, options in entry.items():
        known = PROVIDER_OPTIONS.get(name.lower())  # the runtime ignores the case of a name
        if known is None or options.keys() - known:
            raise ValueError(f"{name} {', '.join(options)} is not on the list of providers and their options")
    return entry


Number = bool | int | float | None
Names = dict[str, Annotated[str, AfterValidator(_name_pattern)]]


class _SessionOptions(_Section):
    log_id: str = ""
    provider_options: list[Annotated[dict[str, dict[str, str]], AfterValidator(_provider)]] = []
    intra_op_num_threads: Number = None
    inter_op_num_threads: Number = None
    log_severity_level: Number = None
    log_verbosity_level: Number = None
    enable_cpu_mem_arena: Number = None
    enable_mem_pattern: Number = None
    graph_optimization_level: str = ""
    fpa_intb_gemm: str = Field("", alias="ep.cuda.fpa_intb_gemm")
    disabled_optimizers: str = Field("", alias="optimization.disable_specified_optimizers")
    device_allocator: str = Field("", alias="session.use_device_allocator_for_initializers")
    spinning: str = Field("", alias="session.intra_op.allow_spinning")


class _SlidingWindow(_Section):
    window_size: Number = None
    pad_value: Number = None
    alignment: str = ""
    cache_slack: Number = None
    slide_key_value_cache: Number = None
    slide_inputs: Number = None
    layers: list[int] = []


class _Decoder(_Section):
    filename: Annotated[str, AfterValidator(_onnx_name)] | None = None
    session_options: _SessionOptions = _SessionOptions()
    inputs: Names = {}
    outputs: Names = {}
    sliding_window: _SlidingWindow | None = None
    layer_types: list[str] = []
    head_size: Number = None
    hidden_size: Number = None
    num_attention_heads: Number = None
    num_hidden_layers: Number = None
    num_key_value_heads: Number = None


class _Model(_Section):
    type: str = ""
    decoder: _Decoder = _Decoder()
    context_length: Number = None
    vocab_size: Number = None
    eos_token_id: Number | list[int] = None
    bos_token_id: Number = None
    pad_token_id: Number = None
    sep_token_id: Number = None
    decoder_start_token_id: Number = None
    image_token_id: Number = None
    bot_token_id: Number = None
    eot_token_id: Number = None
    bor_token_id: Number = None
    eor_token_id: Number = None


class _GenaiConfig(_Section):
    model: _Model = _Model()
    search: dict[str, Number] = {}
    speculative: dict[str, Number] = {}
    engine: dict[str, dict[str, Number]] = {}


def _genai_config(path: Path) -> _GenaiConfig:
    try:
        # Of duplicate keys, the runtime uses both and Python's parser only the last one.
        config = json.loads(read_regular(path).decode(), object_pairs_hook=_without_repetition)
        return _GenaiConfig.model_validate(config)
    except ValidationError as error:
        raise _refusal(f"{GENAI_CONFIG} {_first_fault(error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(f"{GENAI_CONFIG} is not valid: {str(error).rstrip('.')}") from None


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    section = dict(pairs)
    if len(section) != len(pairs):
        raise ValueError("it has an entry twice")
    return section


def _first_fault(error: ValidationError) -> str:
    fault = next((found for found in error.errors() if found["type"] == "extra_forbidden"), error.errors()[0])
    name = ".".join(str(part) for part in fault["loc"]) or "the whole"
    found = str(fault["input"])[:80]
    if fault["type"] == "extra_forbidden":
        return f"sets {name} to {found!r}, which is not on the list of allowed settings"
    return f"sets {name} to {found!r}: {fault['msg'].removeprefix('Value error, ')}"


# ONNX graphs


def _weights_of(name: str, files: Mapping[str, Path]) -> set[str]:
    """Return the files in a graph's folder that contain its weights, after checking the whole graph."""
    import onnx

    try:
        model = onnx.load(files[name], load_external_data=False)
    except Exception as error:  # protobuf raises kinds of its own
        raise _refusal(f"{name} is not a readable ONNX model: {str(error).rstrip('.')}") from None
    own = {(function.domain, function.name) for function in model.functions}
    weights: set[str] = set()
    for graph in (inner for outer in (model.graph, *model.functions) for inner in _graphs(outer)):
        for node in graph.node:
            if node.domain not in ONNX_DOMAINS and (node.domain, node.op_type) not in own:
                raise _refusal(f"{name} has the operator {node.domain}.{node.op_type}, which needs a library")
            if node.op_type in COMPILED_OPERATORS:
                raise _refusal(f"{name} has the operator {node.op_type}, which contains code for a device")
        for tensor in _tensors(graph):
            keys = {entry.key: entry.value for entry in tensor.external_data}
            location = keys.get("location", "")
            if keys.keys() - EXTERNAL_DATA_KEYS or len(keys) < len(tensor.external_data) or location not in files:
                raise _refusal(f"{name} takes weights from {location!r}, which is not a file of the folder")
            weights.add(location)
    return weights


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph or a model function, and the graphs in it (branches, bodies of loops)."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in (attribute.g, *attribute.graphs):
            yield from _graphs(inner)


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield the tensors of a graph whose content is in another file."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    sparse = [tensor for attribute in attributes for tensor in (attribute.sparse_tensor, *attribute.sparse_tensors)]
    sparse += getattr(graph, "sparse_initializer", ())
    tensors = [tensor for attribute in attributes for tensor in (attribute.t, *attribute.tensors)]
    tensors += getattr(graph, "initializer", ())
    tensors += [part for tensor in sparse for part in (tensor.values, tensor.indices)]
    yield from (tensor for tensor in tensors if tensor.external_data)


# The tokenizer's files and those in the same folder


def _check_tokenizer_config(name: str, path: Path) -> None:
    """Refuse entries from which transformers would load classes or files."""
    try:
        todo: list[object] = [json.loads(read_regular(path))]
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(f"{name} is not valid JSON: {str(error).rstrip('.')}") from None
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            if value.get("auto_map"):
                raise _refusal(f"{name} names its own code (auto_map)")
            for key, file in value.items():
                if key.endswith("_file") and isinstance(file, str) and set(file) & set("/\\"):
                    raise _refusal(f"{name} sets {key} to {file[:80]!r}, which is not a file of the folder")
            todo += value.values()


def _refusal(what: str) -> BadInput:
    return BadInput(f"The model is refused before a runtime opens it: {what}.", _WHAT_TO_DO, code="model-refused")
