"""The checkpoints that can be built, according to config.json; `slmops.infra.olive.family_proof` tests them.

Acceptance here is not sufficient: a checkpoint is built only after its configuration gave transformers' logits.
"""

from collections.abc import Collection, Iterator

from slmops.infra.checkpoints.quantized import quantization_of
from slmops.infra.errors import BadInput
from slmops.infra.olive.options import BITS
from slmops.infra.records import Json

# The decoders that onnxruntime-genai 0.18's builder makes from the classes of transformers, and that run on a CPU.
SUPPORTED_ARCHITECTURES = (
    "Ernie4_5ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM",
    "LlamaForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "NemotronForCausalLM",
    "OlmoForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3_5ForCausalLM",
    "SmolLM3ForCausalLM",
)

# Only the text part of multi-modal models is built (`slmops.infra.checkpoints.text_part`).
MULTIMODAL_ARCHITECTURES = (
    "Gemma3ForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
)

# Architectures that the builder or the runtime does not support, with alternatives.
NOT_SUPPORTED = {
    "Gemma3nForConditionalGeneration": "Fine-tune Gemma 3 (google/gemma-3-1b-it or -4b-it) instead.",
    "Gemma3nForCausalLM": "Fine-tune Gemma 3 (google/gemma-3-1b-it or -4b-it) instead.",
    "Olmo2ForCausalLM": "Fine-tune SmolLM3 or Llama 3.2 instead.",
    "Olmo3ForCausalLM": "Fine-tune SmolLM3 or Llama 3.2 instead.",
    "Qwen3MoeForCausalLM": "Fine-tune a dense Qwen3 (Qwen/Qwen3-4B or smaller) instead.",
    "Qwen3NextForCausalLM": "Fine-tune Qwen3.5 or a dense Qwen3 instead.",
    "PhimoeForCausalLM": "Its experts run on CUDA only: fine-tune microsoft/Phi-4-mini-instruct instead.",
}

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# `longrope` is Phi-3's. The runtime always changes from the short factors to the long ones at token 4,097. Hunyuan's
# `dynamic` is a constant (its `alpha`); another model's depends on the text's length.
ROPE_TYPES_OF = {"Phi3ForCausalLM": ("longrope",), "HunYuanDenseV1ForCausalLM": ("dynamic",)}
LONGROPE_ORIGINAL_LENGTH = 4096

FLOATING_ONLY = ("GptOssForCausalLM",)

# Implementations of attention and experts that transformers has itself; any other name is a kernel from the Hub.
OWN_IMPLEMENTATIONS = (
    *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"),
    *("grouped_mm", "batched_mm", "deepgemm", "sonicmoe"),
)
DEEPEST_CONFIG = 50


def check_architecture(config: Json) -> None:
    """Raise `BadInput` unless a checkpoint with this config.json (parsed) may be supported.

    The message names what was found: the architecture, the rotary embedding, the quantization, foreign code.
    """
    architecture = architecture_of(config)
    if architecture not in SUPPORTED_ARCHITECTURES and architecture not in MULTIMODAL_ARCHITECTURES:
        supported = f"Supported are: {', '.join((*SUPPORTED_ARCHITECTURES, *MULTIMODAL_ARCHITECTURES))}."
        raise BadInput(
            f"The architecture {architecture} is not supported.",
            " ".join(filter(None, (NOT_SUPPORTED.get(architecture), supported))),
            code="architecture-not-supported",
        )
    quantization_of(config)
    _check_foreign_code(config)
    _check_hybrid(architecture, config)
    text_config = config.get("text_config")
    _check_rope(architecture, text_config if isinstance(text_config, dict) else config)


def check_family_precisions(architecture: str, precisions: Collection[str]) -> None:
    """Raise `BadInput` for a precision in which an architecture cannot be built."""
    quantized = sorted(set(precisions) & set(BITS))
    if architecture in FLOATING_ONLY and quantized:
        raise BadInput(
            f"{architecture} cannot be built in {' and '.join(quantized)}: the builder reads its experts in four bits "
            "from OpenAI's own file only.",
            "Deploy it with --precision fp16.",
            code="precision-not-supported",
        )


def architecture_of(config: Json) -> str:
    """Return the architecture that config.json names first; raises `BadInput` if it names none."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise BadInput(
            f"config.json names no architecture (architectures: {architectures!r}).",
            f"Supported are: {', '.join(SUPPORTED_ARCHITECTURES)}.",
            code="architecture-not-named",
        )
    return architectures[0]


def passes_original_length(config: Json) -> bool:
    """Whether a model with this config.json changes its rotary embedding in long texts, as Phi-3.5's longrope does."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    return "longrope" in (_value(rope, "rope_type"), _value(rope, "type"))


def _check_foreign_code(config: Json) -> None:
    """Refuse a config.json that makes transformers fetch a kernel, which is code, from the Hub."""
    for key, value in _entries(config):
        names = value.values() if isinstance(value, dict) else [value]
        foreign = [name for name in names if name is not None and name not in OWN_IMPLEMENTATIONS]
        if key.lstrip("_").removesuffix("_internal").endswith("_implementation") and foreign:
            raise BadInput(
                f"config.json has {key}: {str(foreign[0])[:80]!r}, code that transformers would fetch from the Hub.",
                f"Remove {key} from config.json; slmops never runs a checkpoint's code.",
                code="config-names-code",
            )


def _entries(section: object, depth: int = 0) -> Iterator[tuple[str, object]]:
    if depth > DEEPEST_CONFIG or not isinstance(section, dict):
        return
    for key, value in section.items():
        yield str(key), value
        yield from _entries(value, depth + 1)


def _check_hybrid(architecture: str, config: Json) -> None:
    """Refuse Granite 4's layers that the builder omits: Mamba and the mixture of experts."""
    if architecture != "GraniteMoeHybridForCausalLM":
        return
    kinds = config.get("layer_types") or config.get("layers_block_type")
    only_attention = isinstance(kinds, list) and all(kind in ("attention", "full_attention") for kind in kinds)
    if not only_attention or config.get("num_local_experts", 8):
        raise BadInput(
            "This Granite 4 has Mamba layers or a mixture of experts, which onnxruntime-genai's builder does not have.",
            "Fine-tune a dense one (ibm-granite/granite-4.0-micro, -350m or -1b) or Granite 3.3 instead.",
            code="architecture-not-supported",
        )


def _check_rope(architecture: str, config: Json) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_kind = [section for section in rope.values() if isinstance(section, dict)] if isinstance(rope, dict) else []
    sections: list[object] = [*by_kind] or [rope]
    types = [_value(section, "rope_type") or _value(section, "type") or "default" for section in sections]
    supported = (*ROPE_TYPES, *ROPE_TYPES_OF.get(architecture, ()))
    for rope_type in types:
        if rope_type not in supported:
            raise BadInput(
                f"The rotary embedding of type {rope_type} in config.json is not supported for {architecture}.",
                f"Supported are: {', '.join(supported)}.",
                code="rope-not-supported",
            )
    if architecture == "Phi3ForCausalLM":
        _check_original_length(config, rope, "longrope" in types)


def _check_original_length(config: Json, rope: object, is_longrope: bool) -> None:
    """Refuse lengths of a Phi-3 that the builder or the runtime interprets differently."""
    original = config.get("original_max_position_embeddings") or _value(rope, "original_max_position_embeddings")
    original = LONGROPE_ORIGINAL_LENGTH if original is None else original
    length = config.get("max_position_embeddings") or LONGROPE_ORIGINAL_LENGTH
    if not isinstance(length, int) or not isinstance(original, int):
        return  # the sizes are checked when they are read
    if original > length or (original != length and not is_longrope):
        raise BadInput(
            f"config.json has original_max_position_embeddings {original} and max_position_embeddings {length}, which "
            "onnxruntime-genai's builder treats as a longrope model.",
            f"Set original_max_position_embeddings to {length}.",
            code="original-length-not-supported",
        )
    if is_longrope and original not in (LONGROPE_ORIGINAL_LENGTH, length):
        raise BadInput(
            f"The longrope in config.json begins after position {original}; the runtime changes after "
            f"{LONGROPE_ORIGINAL_LENGTH} only.",
            f"Train with original_max_position_embeddings {LONGROPE_ORIGINAL_LENGTH}, as Phi-3.5 and Phi-4-mini have.",
            code="original-length-not-supported",
        )


def _value(section: object, key: str) -> object:
    return section.get(key) if isinstance(section, dict) else None
