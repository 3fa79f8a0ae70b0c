"""The Hub's layout of a GGUF file's metadata and tensors: config.json, and each tensor's name and values.

The changes of llama.cpp's converter (`conversion/` in its source) are reversed here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import open_regular
from slmops.infra.gguf.file import FLOATING_POINT, GgufFile, GgufTensor, Parsed
from slmops.infra.gguf.tokenizer import token_id

GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_BLOCK = BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI_3_BLOCK = BLOCK | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
# Tensors of rotary factors; they become values of config.json.
ROPE_FREQUENCIES = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
LARGEST_LAYERS = 10_000
# Llama 3.1 and 3.2: `original_max_position_embeddings`, `low_freq_factor` and `high_freq_factor`, for which a GGUF file
# has only the resulting factors.
LLAMA_3_ROPE = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class Architecture:
    """The reversal of one of llama.cpp's architectures.

    `permuted` says whether the rows of q and k are interleaved for its rotary embedding, `norms_plus_one` whether a
    norm's weight is stored plus one, which the model adds.
    """

    name: str
    model_type: str
    details: Callable[[GgufFile], Parsed]
    block: dict[str, str] = field(default_factory=lambda: BLOCK)
    permuted: bool = False
    norms_plus_one: bool = False


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint and where it comes from.

    `heads` is the number by which rows are interleaved (None: they are not), `minus` is subtracted from its values.
    """

    name: str
    source: GgufTensor
    heads: int | None = None
    minus: float = 0.0


ABSENT = "absent"  # for a value without a key in a family's config.json


def architecture_of(file: GgufFile) -> Architecture:
    """Return the reversal of a file's architecture; raises `BadInput` for an unknown one."""
    if file.architecture not in ARCHITECTURES:
        raise BadInput(
            f"{file.path} is of the architecture {file.architecture!r}, which is not converted from GGUF.",
            f"Give its source checkpoint, in the Hub's layout; known are {', '.join(ARCHITECTURES)}.",
            code="gguf-architecture",
        )
    if file.metadata.get(f"{file.architecture}.expert_count", 0):
        raise BadInput(
            f"{file.path} is a mixture of experts, which is not converted from GGUF.",
            "Give its source checkpoint, in the Hub's layout.",
            code="gguf-architecture",
        )
    return ARCHITECTURES[file.architecture]


def config_of(file: GgufFile) -> Parsed:
    """Return the config.json of a file's model; raises `BadInput` if the metadata is incomplete."""
    architecture = architecture_of(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise _unfit(file, "it has no tensor token_embd.weight")
    tokens = {f"{name}_token_id": token_id(file, key) for name, key in TOKENS.items()}
    config = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": _size(file, "embedding_length"),
        "intermediate_size": _size(file, "feed_forward_length"),
        "num_hidden_layers": _layers(file),
        "num_attention_heads": _size(file, "attention.head_count"),
        "num_key_value_heads": _size(file, "attention.head_count_kv", _size(file, "attention.head_count")),
        "head_dim": _head_dim(file),
        "max_position_embeddings": _size(file, "context_length"),
        "rms_norm_eps": _real(file, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[stored_as(file)],
        **tokens,  # also without one, because a family's default may be another token
    }
    return {key: value for key, value in (config | architecture.details(file)).items() if value != ABSENT}


def tensors_of(file: GgufFile) -> list[SourceTensor]:
    """Return the checkpoint's tensors; raises `BadInput` for an unknown tensor."""
    architecture = architecture_of(file)
    heads = {"attn_q": _size(file, "attention.head_count")}
    heads["attn_k"] = _size(file, "attention.head_count_kv", heads["attn_q"])
    tensors = []
    for tensor in file.tensors.values():
        if tensor.name in (ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT):
            continue
        if len(tensor.shape) == 1 and tensor.kind not in FLOATING_POINT:
            raise _unfit(file, f"its tensor {tensor.name!r} of one row is of the type {tensor.kind}")
        stem, _, suffix = tensor.name.rpartition(".")
        tensors.append(
            SourceTensor(
                name=f"{_hub_name(file, architecture, stem, tensor)}.{suffix}",
                source=tensor,
                heads=heads.get(stem.rpartition(".")[2]) if architecture.permuted else None,
                minus=1.0 if architecture.norms_plus_one and stem.endswith("norm") else 0.0,
            )
        )
    for permuted in filter(lambda tensor: tensor.heads, tensors):
        if permuted.source.shape[0] % (2 * (permuted.heads or 1)):
            raise _unfit(file, f"the tensor {permuted.source.name!r} has {permuted.source.shape[0]} rows")
    return tensors


def stored_as(file: GgufFile) -> str:
    """Return the type of the checkpoint's config, and of what does not keep its own: `F32`, `F16` or `BF16`.

    F16 represents a quantized weight eight times more precisely than BF16. In a model of type F16, Gemma's activations
    would exceed the range.
    """
    if file.quantization:
        return "BF16" if file.architecture.startswith("gemma") else "F16"
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return kinds.pop() if len(kinds) == 1 else "F32"


def _hub_name(file: GgufFile, architecture: Architecture, stem: str, tensor: GgufTensor) -> str:
    if stem in GLOBAL:
        return GLOBAL[stem]
    first, _, rest = stem.partition(".")
    number, _, part = rest.partition(".")
    if first != "blk" or part not in architecture.block or not number.isascii() or not number.isdigit():
        raise _unfit(file, f"a model of {architecture.name} has no place for its tensor {tensor.name!r}")
    return f"model.layers.{int(number)}.{architecture.block[part]}"


def _llama(file: GgufFile) -> Parsed:
    return {
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "rope_parameters": _rope(file),
    }


def _qwen(file: GgufFile) -> Parsed:
    return {"hidden_act": "silu", "use_sliding_window": False, "rope_parameters": _rope(file)}


def _smollm3(file: GgufFile) -> Parsed:
    return {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_parameters": _rope(file),
        "no_rope_layer_interval": 4,
    }


def _granite(file: GgufFile) -> Parsed:
    return {
        **_llama(file),
        "attention_multiplier": _real(file, "attention.scale"),
        "embedding_multiplier": _real(file, "embedding_scale", 1.0),
        "residual_multiplier": _real(file, "residual_scale", 1.0),
        "logits_scaling": _real(file, "logit_scale", 1.0),
    }


def _phi3(file: GgufFile) -> Parsed:
    context = _size(file, "context_length")
    original = _size(file, "rope.scaling.original_context_length", context)
    rope: Parsed = {"rope_type": "default", "rope_theta": _real(file, "rope.freq_base", 10000.0)}
    if ROPE_LONG in file.tensors and ROPE_SHORT in file.tensors:
        factors = {"long_factor": _numbers(file, ROPE_LONG), "short_factor": _numbers(file, ROPE_SHORT)}
        rope |= {"rope_type": "longrope", "type": "longrope", **factors, "original_max_position_embeddings": original}
    window = file.metadata.get("phi3.attention.sliding_window") or None
    rotary = _size(file, "rope.dimension_count", _head_dim(file)) / _head_dim(file)
    return {
        "hidden_act": "silu",
        "head_dim": ABSENT,
        "original_max_position_embeddings": original,
        "sliding_window": window,
        "rope_parameters": rope | {"partial_rotary_factor": rotary},
    }


def _gemma(file: GgufFile, largest_layers: int) -> Parsed:
    """Values that are in llama.cpp's code but not in its files (src/models/gemma2.cpp and gemma3.cpp)."""
    hidden, heads = _size(file, "embedding_length"), _size(file, "attention.head_count")
    is_largest = _layers(file) == largest_layers  # its attention is scaled by another rule
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if is_largest else _head_dim(file),
        "final_logit_softcapping": _softcapping(file, "final_logit_softcapping"),
        "attn_logit_softcapping": _softcapping(file, "attn_logit_softcapping"),
        "sliding_window": _size(file, "attention.sliding_window"),
    }


def _gemma2(file: GgufFile) -> Parsed:
    layers = _layers(file)
    return _gemma(file, 46) | {
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
        "rope_parameters": _rope(file),
    }


def _gemma3(file: GgufFile) -> Parsed:
    kinds = ["sliding_attention", "full_attention"]
    layers = _layers(file)
    local = {"rope_type": "default", "rope_theta": _real(file, "rope.freq_base_swa", 10000.0)}
    return _gemma(file, 62) | {
        "layer_types": [kinds[(layer + 1) % 6 == 0] for layer in range(layers)],
        "rope_parameters": {"full_attention": _rope(file), "sliding_attention": local},
    }


def _rope(file: GgufFile) -> Parsed:
    theta = _real(file, "rope.freq_base", 10000.0)
    dimensions = _size(file, "rope.dimension_count", _head_dim(file))
    if dimensions != _head_dim(file):
        raise _unfit(file, f"it rotates {dimensions} of a head's {_head_dim(file)} dimensions")
    if ROPE_FREQUENCIES in file.tensors:
        return _llama3_rope(file, theta)
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    rope = {"rope_type": kind, "rope_theta": theta, "factor": _real(file, "rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = _size(file, "rope.scaling.original_context_length")
    return rope


def _llama3_rope(file: GgufFile, theta: float) -> Parsed:
    """Return the parameters of the file's factors; raises `BadInput` if Llama 3's parameters give others."""
    import numpy as np

    factors = np.asarray(_numbers(file, ROPE_FREQUENCIES))
    dimensions, factor = 2 * len(factors), float(factors.max())
    low, high = (LLAMA_3_ROPE[f"{name}_freq_factor"] for name in ("low", "high"))
    turns = LLAMA_3_ROPE["original_max_position_embeddings"] * theta ** -(np.arange(0, dimensions, 2) / dimensions)
    smooth = np.clip((turns / (2 * np.pi) - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise _unfit(file, f"its tensor {ROPE_FREQUENCIES} has other factors than Llama 3's rotary embedding")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA_3_ROPE}


def _numbers(file: GgufFile, name: str) -> list[float]:
    """Return the values of a small tensor of plain numbers."""
    import numpy as np

    tensor = file.tensors[name]
    if tensor.kind != "F32" or tensor.size_bytes > 2**16:
        raise _unfit(file, f"its tensor {name!r} is of the type {tensor.kind} and has {tensor.size_bytes:,} bytes")
    with open_regular(file.path) as stream:
        stream.seek(tensor.start)
        values = np.frombuffer(stream.read(tensor.size_bytes), "<f4")
    return [_shortest(value) for value in values]


def _layers(file: GgufFile) -> int:
    layers = _size(file, "block_count")
    if layers > LARGEST_LAYERS:
        raise _unfit(file, f"{file.architecture}.block_count is {layers}")
    return layers


def _head_dim(file: GgufFile) -> int:
    width = _size(file, "attention.key_length", _size(file, "embedding_length") // _size(file, "attention.head_count"))
    if _size(file, "attention.value_length", width) != width:
        raise _unfit(file, "its keys and values are not of the same width")
    return width


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    name = f"{file.architecture}.{key}"
    value = file.get(name, int, default)
    if value <= 0:
        raise _unfit(file, f"{name} is {value}")
    return value


def _real(file: GgufFile, key: str, default: float | None = None) -> float:
    return _shortest(file.get(f"{file.architecture}.{key}", float, default))


def _softcapping(file: GgufFile, key: str) -> float | None:
    return _real(file, key, 0.0) or None


def _shortest(value: float) -> float:
    """Return the shortest decimal number of a 32-bit float: 1e-05 for 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _unfit(file: GgufFile, fault: str) -> BadInput:
    return BadInput(
        f"{file.path} cannot be converted: {fault}.",
        "Export it again, or give its source checkpoint, in the Hub's layout.",
        code="gguf-unfit",
    )


TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", _llama, permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", _qwen),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _qwen),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", _gemma2, GEMMA_BLOCK, norms_plus_one=True),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", _gemma3, GEMMA_BLOCK, norms_plus_one=True),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", _phi3, PHI_3_BLOCK),
    "granite": Architecture("GraniteForCausalLM", "granite", _granite, permuted=True),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", _smollm3, permuted=True),
}
