"""Tiny checkpoints with random weights and a real tokenizer, as the tests' input."""

import json
from pathlib import Path
from typing import Any

# The tokenizer is trained on these; repeated so that common words become single tokens.
SENTENCES = (
    "Turn on the lights in the kitchen, please.",
    "Set the bedroom temperature to 21 degrees at 7:30 tomorrow.",
    'You answer with JSON: {"action": "turn_on", "room": "kitchen", "device": "light", "value": null}',
    "The quick brown fox jumps over the lazy dog while 12 small models answer 345 questions.",
    "What is the capital of France? The capital of France is Paris.",
    "Übergrößen, naïve café, 東京 und Ελλάδα test the byte fallback.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
)

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<bos>",
    "<eos>",
    "<pad>",
)

VOCABULARY_SIZE = 512  # the embedding's rows; the tokenizer has at most as many tokens

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
}

# Beginning of text (None: the template writes none) and end of turn, per chat template.
BEGIN_AND_END_TOKENS: dict[str, tuple[str | None, str]] = {
    "chatml": (None, "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "phi3": ("<s>", "<|end|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<end_of_turn>"),
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3-rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "phi3": {"model_type": "phi3", "original_max_position_embeddings": 1024},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 32, "sliding_window": 512},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 32, "sliding_window": 512},
    "olmo2": {"model_type": "olmo2"},
    "gpt2": {"model_type": "gpt2"},
}
TIED_FAMILIES = {"qwen2", "qwen3", "smollm3", "granite", "gemma2", "gemma3", "gpt2"}


def make_tiny_checkpoint(
    directory: Path,
    family: str = "qwen2",
    *,
    seed: int = 0,
    chat_template: str | None = "chatml",
    tied: bool | None = None,
    dtype: str = "bfloat16",
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_hidden_layers: int = 2,
    head_dim: int = 32,
    vocab_size: int = VOCABULARY_SIZE,
    max_position_embeddings: int = 1024,
    max_shard_size: str = "5GB",
    **config_overrides: Any,
) -> Path:
    """Save a checkpoint with random weights of `family` (a key of FAMILIES) into `directory` and return it.

    The default size is about 0.1 M parameters. The weights are drawn wide, so that the most likely next token is
    clear. `chat_template` is a key of CHAT_TEMPLATES, or None for a tokenizer without a template. `tied` says whether
    embedding and lm_head share their weights; default: as is usual in the family. `config_overrides` go into
    config.json.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _save_tokenizer(directory, chat_template, max_position_embeddings)
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": hidden_size // head_dim,
        "num_key_value_heads": max(1, hidden_size // head_dim // 2),
        "max_position_embeddings": max_position_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": family in TIED_FAMILIES if tied is None else tied,
        **FAMILIES[family],
        **config_overrides,
    }
    if family not in {"phi3", "gpt2", "olmo2"}:
        values.setdefault("head_dim", head_dim)
    if family == "gpt2":
        values.update(n_embd=hidden_size, n_layer=num_hidden_layers, n_head=hidden_size // head_dim)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    draw_weights(model, seed)
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def draw_weights(model: Any, seed: int) -> None:
    """Draw matrices with a gain that keeps activations near 1, and embedding and lm_head wide enough to be clear."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:  # biases and norms: keep their start value, moved a little
                parameter.add_(0.1 * noise)
            elif "embed" in name or "wte" in name or "lm_head" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def _save_tokenizer(directory: Path, chat_template: str | None, max_length: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    # Qwen2's own pre-tokenizer: AutoTokenizer puts it into every tokenizer of a Qwen2 checkpoint, whatever the
    # tokenizer was trained with, and leaves that of the other families as saved.
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        SENTENCES * 4,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE - len(CONTROL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            min_frequency=2,
        ),
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    bos, eos = BEGIN_AND_END_TOKENS[chat_template or "chatml"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATES[chat_template] if chat_template else None
    tokenizer.save_pretrained(directory)
    return tokenizer


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def read_config(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text("utf-8"))
    return config
