"""The shapes of a checkpoint's weights according to config.json, compared with those in their headers."""

from pathlib import Path

from slmops.infra.checkpoints.folder import TensorHeader
from slmops.infra.checkpoints.tying import EMBEDDING, LM_HEAD, says_tied
from slmops.infra.errors import BadInput
from slmops.infra.olive.architectures import architecture_of
from slmops.infra.records import Json

# Far above any model's size; a damaged config must not make the count take hours.
LARGEST_SIZE = 100_000_000
LARGEST_LAYERS = 10_000


# Their layers have Llama's tensors (Phi-3's fused), and their configs on the Hub write every size.
LAYERS_AS_LLAMA = (
    *("GemmaForCausalLM", "Gemma2ForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
    *("Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"),
)


def check_shapes(folder: Path, config: Json, headers: dict[str, TensorHeader]) -> TensorHeader:
    """Compare the weights with the shapes in config.json, and return the embedding's header."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        found = headers.get(name)
        if found is None:
            raise BadInput(
                f"{folder} has no tensor {name}, which config.json requires.",
                "The weights and config.json are not of the same model: save both again.",
                code="tensor-missing",
            )
        if found.shape != shape:
            raise BadInput(
                f"The tensor {name} in {folder} has shape {list(found.shape)}, config.json says {list(shape)}.",
                "The weights and config.json are not of the same model: save both again.",
                code="tensor-shape",
            )
    embedding = headers.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise BadInput(f"{folder} has no matrix {EMBEDDING}.", "Save the checkpoint again.", code="tensor-missing")
    return embedding


def expected_shapes(config: Json) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that config.json requires, without biases and norms.

    For architectures with other layers than Llama's, or with default sizes, these are only tensors whose sizes are in
    config.json. The proof of a family loads a layer of each kind.
    """
    if architecture_of(config) not in LAYERS_AS_LLAMA:
        sizes = {name: config[name] for name in ("vocab_size", "hidden_size") if name in config}
        return {EMBEDDING: (size_of(config, "vocab_size"), size_of(config, "hidden_size"))} if len(sizes) == 2 else {}
    hidden, vocabulary = size_of(config, "hidden_size"), size_of(config, "vocab_size")
    intermediate, heads = size_of(config, "intermediate_size"), size_of(config, "num_attention_heads")
    layers = size_of(config, "num_hidden_layers")
    if layers > LARGEST_LAYERS:
        raise BadInput(
            f"config.json has num_hidden_layers: {layers}.", "Save the checkpoint again.", code="layers-not-valid"
        )
    kv_heads = size_of(config, "num_key_value_heads", default=heads)
    head_dim = size_of(config, "head_dim", default=hidden // heads)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        if config.get("model_type") == "phi3":
            shapes[f"{prefix}.self_attn.qkv_proj.weight"] = ((heads + 2 * kv_heads) * head_dim, hidden)
            shapes[f"{prefix}.mlp.gate_up_proj.weight"] = (2 * intermediate, hidden)
        else:
            shapes[f"{prefix}.self_attn.q_proj.weight"] = (heads * head_dim, hidden)
            shapes[f"{prefix}.self_attn.k_proj.weight"] = (kv_heads * head_dim, hidden)
            shapes[f"{prefix}.self_attn.v_proj.weight"] = (kv_heads * head_dim, hidden)
            shapes[f"{prefix}.mlp.gate_proj.weight"] = (intermediate, hidden)
            shapes[f"{prefix}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
    if not says_tied(config):
        shapes[LM_HEAD] = (vocabulary, hidden)
    return shapes


def size_of(config: Json, key: str, *, default: int | None = None) -> int:
    """Return a size that a config states; raises `BadInput` if it is missing without a default, or not a size."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST_SIZE:
        raise BadInput(
            f"The config has {key}: {value!r}, which is not a size.",
            "Save the checkpoint again.",
            code="size-not-valid",
        )
    return value
