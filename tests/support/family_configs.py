"""The families' config.json as the Hub has them, and checkpoints with random weights in these shapes."""

import json
from pathlib import Path
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"

# Factors of longrope, one per frequency, short and long.
_PHI_3_5 = (
    (
        1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, 1.0499999523162842, 1.0499999523162842,
        1.0499999523162842, 1.0499999523162842, 1.0499999523162842, 1.0699999332427979, 1.0999999046325684,
        1.1099998950958252, 1.1599998474121094, 1.1599998474121094, 1.1699998378753662, 1.2899998426437378,
        1.339999794960022, 1.679999828338623, 1.7899998426437378, 1.8199998140335083, 1.8499997854232788,
        1.8799997568130493, 1.9099997282028198, 1.9399996995925903, 1.9899996519088745, *[2.0199997425079346] * 6,
        *[2.0299997329711914] * 9, 2.0799996852874756, 2.0899996757507324, 2.189999580383301, 2.2199995517730713,
        2.5899994373321533, 2.729999542236328, 2.749999523162842, 2.8399994373321533,
    ),
    (
        1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
        1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
        4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
        17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
        32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
        50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
        62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457,
        63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
        64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
        64.51000213623047, 64.52999877929688, 64.83999633789062,
    ),
)  # fmt: skip
_PHI_4_MINI = (
    (1.0,) * 48,
    (
        1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
        2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
        6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
        16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
        32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
    ),
)  # fmt: skip

# By the model that people fine-tune. Sizes that the proof's key leaves out (layers, vocabulary, width of the MLP) are
# small from the start; lists of layers name one of each kind, in the order of their first occurrence.
REAL: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "max_window_layers": 21,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8,
        "max_position_embeddings": 40960, "max_window_layers": 28, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    },
    "Qwen/Qwen3.5-0.8B (text)": {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "attention_bias": False,
        "attn_output_gate": True, "head_dim": 256, "hidden_act": "silu", "hidden_size": 1024,
        "num_attention_heads": 8, "num_key_value_heads": 2, "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 16, "layer_types": ["linear_attention", FULL],
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-06, "tie_word_embeddings": True,
        "mtp_num_hidden_layers": 1, "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
            "rope_theta": 10000000, "rope_type": "default",
        },
    },
    "meta-llama/Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "mlp_bias": False, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "mlp_bias": False, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1536,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 131072,
        "max_window_layers": 21, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
        "tie_word_embeddings": False, "use_sliding_window": False, "use_mrope": False,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "mlp_bias": False, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 100000,
        "is_llama_config": True, "rope_interleaved": False, "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False,
        "hidden_act": "silu", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4,
        "layer_types": [FULL, FULL], "no_rope_layers": [1, 0], "no_rope_layer_interval": 4,
        "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False,
    },
    "microsoft/Phi-3-mini-4k-instruct": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072,
        "num_attention_heads": 32, "num_key_value_heads": 32, "attention_bias": False, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    },
    "microsoft/Phi-3.5-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072,
        "num_attention_heads": 32, "num_key_value_heads": 32, "attention_bias": False,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": _PHI_3_5[0], "long_factor": _PHI_3_5[1]},
        "sliding_window": 262144, "tie_word_embeddings": False,
    },
    "microsoft/Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072,
        "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": _PHI_4_MINI[0], "long_factor": _PHI_4_MINI[1]},
        "attention_bias": False, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
        "sliding_window": 262144, "tie_word_embeddings": True,
    },
    "google/gemma-2-2b-it": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False,
        "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    },
    "google/gemma-3-270m-it": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "_sliding_window_pattern": 6,
        "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "num_attention_heads": 4,
        "num_key_value_heads": 1, "layer_types": [SLIDING, FULL], "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": 512, "use_bidirectional_attention": False,
    },
    "google/gemma-3-4b-it (text)": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 2560,
        "layer_types": [SLIDING, FULL], "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "mistralai/Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    },
    "mistralai/Ministral-3-3B-Instruct-2512 (text)": {
        "architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-05, "sliding_window": None, "tie_word_embeddings": True,
        "rope_parameters": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0,
            "rope_type": "yarn", "type": "yarn",
        },
    },
    "ibm-granite/granite-3.3-2b-instruct": {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_bias": False,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 2048,
        "logits_scaling": 8.0, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "mlp_bias": False, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000000.0, "tie_word_embeddings": True,
    },
    "ibm-granite/granite-4.0-micro": {
        "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "attention_bias": False,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12, "hidden_act": "silu", "hidden_size": 2560,
        "layer_types": ["attention", "attention"], "logits_scaling": 10, "num_attention_heads": 40,
        "num_key_value_heads": 8, "num_local_experts": 0, "num_experts_per_tok": 0, "max_position_embeddings": 131072,
        "position_embedding_type": "rope", "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000000, "shared_intermediate_size": 128, "mamba_n_heads": 128, "mamba_d_head": 40,
        "mamba_expand": 2, "tie_word_embeddings": True,
    },
    "LiquidAI/LFM2-350M": {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "block_auto_adjust_ff_dim": True,
        "block_dim": 1024, "block_ff_dim": 6656, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256,
        "block_norm_eps": 1e-05, "block_use_swiglu": True, "conv_L_cache": 3, "conv_bias": False, "hidden_size": 1024,
        "layer_types": ["conv", FULL], "max_position_embeddings": 128000, "norm_eps": 1e-05,
        "num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    "baidu/ERNIE-4.5-0.3B-PT": {
        "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_bias": False,
    },
    "tencent/Hunyuan-0.5B-Instruct": {
        "architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense", "attention_bias": False,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "rope_scaling": {
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "tie_word_embeddings": True, "use_qk_norm": True,
    },
    "openai/gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2880, "layer_types": [SLIDING, FULL], "num_attention_heads": 64,
        "num_key_value_heads": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_per_token": 2,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 150000, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
    },
    "nvidia/Nemotron-Mini-4B-Instruct": {
        "architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "attention_bias": False, "head_dim": 128,
        "hidden_act": "relu2", "hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8,
        "max_position_embeddings": 4096, "norm_eps": 1e-05, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
        "mlp_bias": False, "tie_word_embeddings": False,
    },
}  # fmt: skip
SMALL = {"vocab_size": 512, "intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


def small_config(model: str) -> dict[str, Any]:
    """Return a model's config in tiny widths: two heads of 32, windows of 48; the rotary embedding is as it is.

    Longrope keeps its original length, which is the runtime's, and Qwen3.5 the head that its sections are of.
    """
    config = {**REAL[model], **SMALL, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
    config["num_key_value_heads"] = 1
    kind = config["model_type"]
    if "head_dim" in config or kind == "gemma3_text":
        config["head_dim"] = 256 if kind == "qwen3_5_text" else 32
    if config.get("sliding_window") and config["sliding_window"] < 5000:
        config["sliding_window"] = 48
    if "partial_rotary_factor" in config and kind == "phi3":
        config["hidden_size"] = 128  # the operator takes rotary embeddings of a multiple of 16 only
    if kind == "gpt_oss":
        config["rope_scaling"] = {**config["rope_scaling"], "original_max_position_embeddings": 256}
    if kind == "granitemoehybrid":
        config |= {"mamba_n_heads": 4, "mamba_d_head": 32}
    if kind == "lfm2":
        config["block_multiple_of"] = 32
    return config


def with_factors(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose longrope has the first of its factors, as many as its rotary embedding has frequencies."""
    rope = config.get("rope_scaling")
    if not isinstance(rope, dict) or "long_factor" not in rope:
        return config
    rotated = int(config["hidden_size"] // config["num_attention_heads"] * config.get("partial_rotary_factor", 1)) // 2
    factors = {name: list(rope[name][:rotated]) for name in ("short_factor", "long_factor")}
    return {**config, "rope_scaling": {**rope, **factors}}


def make_family(directory: Path, config: dict[str, Any], *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Save a checkpoint with random weights and this config.json, as it stands; it has no tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.checkpoints import draw_weights

    config = with_factors({**SMALL, "num_hidden_layers": 2, **config, "torch_dtype": dtype})
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    draw_weights(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return directory
