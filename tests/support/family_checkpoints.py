"""Tiny checkpoints with random weights and the real tokenizer and chat template of a family of models.

`family_checkpoint("llama-3.2")` makes one the first time and keeps it beside the real models of
`tests.support.real_models`. Tests of every family leave out those of LARGE, unless SLMOPS_TESTS_REAL_TOKENIZERS is
`all`.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.real_models import cache_folder, real_model
from tests.tasks.chat_templates import TEMPLATES


@dataclass(frozen=True)
class RealFamily:
    """How a family's checkpoint is made.

    `model` is a key of tests.support.checkpoints.FAMILIES, `tokenizer` a name in tests.support.real_models.MODELS whose
    vocabulary the family shares; `added` are the control tokens that the family has in place of that vocabulary's or
    behind them (id -> text), and `last` is the largest id that it keeps. `template` is a file of llama.cpp's templates
    or of tests.tasks.chat_templates, None the tokenizer's own.
    """

    model: str
    tokenizer: str
    template: str | None = None
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    added: dict[int, str] = field(default_factory=dict)
    last: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    begins: bool = True  # whether the tokenizer puts its begin token before a text, as the shared one does


def _rope_of_llama_3(factor: float) -> dict[str, Any]:
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **frequencies}}


_GRANITE = {49152: "<|start_of_role|>", 49153: "<|end_of_role|>", 49154: "<|tool_call|>"}
_BAR = "\uff5c"
_DEEPSEEK_R1_LLAMA = {
    128000: f"<{_BAR}begin▁of▁sentence{_BAR}>",
    128001: f"<{_BAR}end▁of▁sentence{_BAR}>",
    128011: f"<{_BAR}User{_BAR}>",
    128012: f"<{_BAR}Assistant{_BAR}>",
    128013: "<think>",
    128014: "</think>",
    128015: f"<{_BAR}▁pad▁{_BAR}>",
}
_DEEPSEEK_R1_QWEN = {
    151643: f"<{_BAR}end▁of▁sentence{_BAR}>",
    151644: f"<{_BAR}User{_BAR}>",
    151645: f"<{_BAR}Assistant{_BAR}>",
    151646: f"<{_BAR}begin▁of▁sentence{_BAR}>",
    151647: "<|EOT|>",
    151648: "<think>",
    151649: "</think>",
}
_PHI_4_MINI = {
    199999: "<|endoftext|>",
    200019: "<|assistant|>",
    200020: "<|end|>",
    200021: "<|user|>",
    200022: "<|system|>",
    200023: "<|tool|>",
    200024: "<|/tool|>",
    200025: "<|tool_call|>",
    200026: "<|/tool_call|>",
    200027: "<|tool_response|>",
}
_GRANITE_4 = {
    100256: "<|pad|>",
    100257: "<|end_of_text|>",
    100264: "<|start_of_role|>",
    100265: "<|end_of_role|>",
}
# LFM2's control tokens at the numbers of Llama 3's: both split texts alike, and no package has LFM2's own vocabulary.
_LFM2 = {
    128000: "<|startoftext|>",
    128001: "<|pad|>",
    128006: "<|im_start|>",
    128007: "<|im_end|>",
    128008: "<|tool_call_start|>",
    128009: "<|tool_call_end|>",
}
_SMOLLM3 = {
    128002: "<think>",
    128003: "</think>",
    128011: "<|im_start|>",
    128012: "<|im_end|>",
    128013: "<tool_response>",
    128014: "</tool_response>",
    128015: "<tool_call>",
    128016: "</tool_call>",
    128017: "<code>",
    128018: "</code>",
}

REAL_FAMILIES = {
    "smollm2": RealFamily("llama", "smollm2"),
    "llama-2": RealFamily("llama", "tokenizers/llama-spm", "llama-2"),
    "llama-3": RealFamily("llama", "tokenizers/llama3"),
    "llama-3.1": RealFamily(
        "llama", "tokenizers/llama3_1", "meta-llama-Llama-3.1-8B-Instruct", config=_rope_of_llama_3(8.0)
    ),
    "llama-3.2": RealFamily(
        "llama", "tokenizers/llama3_1", "meta-llama-Llama-3.2-3B-Instruct", config=_rope_of_llama_3(32.0)
    ),
    "deepseek-r1-distill-llama": RealFamily(
        "llama",
        "tokenizers/llama3_1",
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        bos=_DEEPSEEK_R1_LLAMA[128000],
        eos=_DEEPSEEK_R1_LLAMA[128001],
        added=_DEEPSEEK_R1_LLAMA,
        config=_rope_of_llama_3(8.0),
    ),
    "smollm3": RealFamily(
        "smollm3", "tokenizers/llama3_1", "HuggingFaceTB-SmolLM3-3B", eos="<|im_end|>", added=_SMOLLM3, begins=False
    ),
    "lfm2": RealFamily(
        "llama",
        "tokenizers/llama3_1",
        "LFM2.5-Instruct",
        bos=_LFM2[128000],
        eos="<|im_end|>",
        pad="<|pad|>",
        added=_LFM2,
    ),
    "qwen2.5": RealFamily("qwen2", "tokenizers/qwen3", "Qwen-Qwen2.5-7B-Instruct", last=151664),
    "qwen3": RealFamily("qwen3", "tokenizers/qwen3"),
    "deepseek-r1-distill-qwen": RealFamily(
        "qwen2",
        "tokenizers/qwen3",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
        bos=_DEEPSEEK_R1_QWEN[151646],
        eos=_DEEPSEEK_R1_QWEN[151643],
        pad=_DEEPSEEK_R1_QWEN[151643],
        added=_DEEPSEEK_R1_QWEN,
        last=151664,
    ),
    "qwen3.5": RealFamily("qwen3", "tokenizers/qwen35", "Qwen3.5-4B", eos="<|im_end|>"),
    "gemma-2": RealFamily("gemma2", "tokenizers/gemini", "google-gemma-2-2b-it", bos="<bos>", eos="<eos>"),
    "gemma-3": RealFamily("gemma3", "tokenizers/gemma3"),
    "mistral-v0.1": RealFamily("mistral", "tokenizers/llama2", "mistral-v0.1"),
    "mistral-v0.3": RealFamily("mistral", "tokenizers/mistral-v0.3", "mistral-v0.3"),
    "ministral-3": RealFamily("mistral", "tokenizers/tekken", "mistralai-Ministral-3-14B-Reasoning-2512"),
    "phi-3": RealFamily("phi3", "tokenizers/phi-3", "phi-3", bos="<s>", eos="<|end|>"),
    "phi-3.5": RealFamily("phi3", "tokenizers/phi-3", "microsoft-Phi-3.5-mini-instruct", bos="<s>", eos="<|end|>"),
    "phi-4-mini": RealFamily(
        "phi3",
        "tokenizers/gptoss",
        "phi-4-mini",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        added=_PHI_4_MINI,
        last=199999,
        begins=False,
    ),
    "gpt-oss": RealFamily("llama", "tokenizers/gptoss", "openai-gpt-oss-120b", bos="<|startoftext|>", eos="<|return|>"),
    "granite-4": RealFamily(
        "granite",
        "tokenizers/gpt35turbo",
        "ibm-granite-granite-4.0",
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        pad="<|pad|>",
        added=_GRANITE_4,
        last=100255,
        begins=False,
    ),
    "granite-3.3": RealFamily(
        "granite",
        "tokenizers/starcoder",
        "ibm-granite-granite-3.3-2B-Instruct",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        added=_GRANITE,
    ),
}

# Which configurations of tests.support.family_configs Foundry is asked about with their real tokenizer and template. Of
# Qwen3.5 and LFM2, llama.cpp has the splitting of texts and the template; the vocabulary is Qwen2's and Llama 3's.
TOKENIZER_OF = {
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5",
    "HuggingFaceTB/SmolLM3-3B": "smollm3",
    "Qwen/Qwen3-0.6B": "qwen3",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "deepseek-r1-distill-qwen",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "microsoft/Phi-3-mini-4k-instruct": "phi-3",
    "microsoft/Phi-3.5-mini-instruct": "phi-3.5",
    "microsoft/Phi-4-mini-instruct": "phi-4-mini",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2",
    "Qwen/Qwen3.5-0.8B (text)": "qwen3.5",
    "google/gemma-2-2b-it": "gemma-2",
    "google/gemma-3-270m-it": "gemma-3",
    "google/gemma-3-4b-it (text)": "gemma-3",
    "mistralai/Mistral-7B-v0.1": "mistral-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-v0.3",
    "mistralai/Ministral-3-3B-Instruct-2512 (text)": "ministral-3",
    "ibm-granite/granite-3.3-2b-instruct": "granite-3.3",
    "ibm-granite/granite-4.0-micro": "granite-4",
    "openai/gpt-oss-20b": "gpt-oss",
    "LiquidAI/LFM2-350M": "lfm2",
}

# Families whose vocabulary takes each test several seconds, or is that of another family too.
LARGE = {
    "deepseek-r1-distill-llama",
    "deepseek-r1-distill-qwen",
    "gemma-2",
    "gemma-3",
    "gpt-oss",
    "lfm2",
    "llama-3.1",
    "phi-4-mini",
    "qwen2.5",
    "qwen3.5",
}


def is_left_out(name: str) -> bool:
    """Whether a family (a key of REAL_FAMILIES) is left out of this run."""
    return name in LARGE and os.environ.get("SLMOPS_TESTS_REAL_TOKENIZERS") != "all"


def family_checkpoint(name: str, **changes: Any) -> Path:
    """Return a tiny checkpoint (a key of REAL_FAMILIES), made now if it is not kept yet; read only.

    `changes` are further arguments of `make_tiny_checkpoint`; each set of them is a checkpoint of its own.

    Raises `RealModelMissing` where the tokenizer or the template can be neither found nor fetched.
    """
    told = "-".join(f"{key}={value}" for key, value in sorted(changes.items()))
    made = cache_folder() / "families" / "-".join(filter(None, (name, told)))
    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{made}.lock"):
        if not made.is_dir():
            with tempfile.TemporaryDirectory(dir=made.parent) as aside:
                _make(REAL_FAMILIES[name], Path(aside) / "made", changes)
                (Path(aside) / "made").rename(made)
    return made


def save_real_tokenizer(family: RealFamily, directory: Path) -> int:
    """Write the family's tokenizer.json, tokenizer_config.json and chat template; return how many tokens it has."""
    shared = real_model(family.tokenizer)
    tokenizer = json.loads((shared / "tokenizer.json").read_text("utf-8"))
    config = json.loads((shared / "tokenizer_config.json").read_text("utf-8"))
    _set_added_tokens(tokenizer, family)
    config.pop("added_tokens_decoder", None)  # tokenizer.json has them
    if not family.begins:
        tokenizer["post_processor"] = None
        config["add_bos_token"] = False
    if family.eos:
        config |= {"bos_token": family.bos, "eos_token": family.eos}
    if family.pad:
        config["pad_token"] = family.pad
    config["chat_template"] = _template_of(family, config)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), "utf-8")
    return 1 + max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))


def _set_added_tokens(tokenizer: dict[str, Any], family: RealFamily) -> None:
    kept = {token["id"]: token for token in tokenizer["added_tokens"]}
    if family.last is not None:
        kept = {number: token for number, token in kept.items() if number <= family.last}
        vocabulary = tokenizer["model"]["vocab"].items()
        tokenizer["model"]["vocab"] = {token: number for token, number in vocabulary if number <= family.last}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    kept |= {number: {"id": number, "content": text, **plain} for number, text in family.added.items()}
    tokenizer["added_tokens"] = [kept[number] for number in sorted(kept)]
    renamed = json.dumps(tokenizer["post_processor"])  # names its begin token, which may have another text here
    if family.bos and tokenizer["post_processor"]:
        renamed = renamed.replace("<|begin_of_text|>", family.bos)
    tokenizer["post_processor"] = json.loads(renamed)


def _template_of(family: RealFamily, config: dict[str, Any]) -> str:
    if family.template is None:
        beside = real_model(family.tokenizer) / "chat_template.jinja"
        return beside.read_text("utf-8") if beside.is_file() else str(config["chat_template"])
    ours = TEMPLATES / f"{family.template}.jinja"
    real = real_model("llama-cpp-models") / "templates" / f"{family.template}.jinja"
    return (ours if ours.is_file() else real).read_text("utf-8")


def _make(family: RealFamily, directory: Path, changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as aside:
        tokens = save_real_tokenizer(family, Path(aside))
        make_tiny_checkpoint(directory, family.model, vocab_size=tokens, **family.config | changes)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (directory / file).unlink(missing_ok=True)
        shutil.copytree(aside, directory, dirs_exist_ok=True)
    _name_end_tokens(directory)


def _name_end_tokens(directory: Path) -> None:
    """Write the ids of the real tokenizer's begin, end and padding into both configs."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    named = {name: config.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    found = {f"{name}_token_id": ids[text] for name, text in texts.items() if text is not None}
    found.setdefault("pad_token_id", found["eos_token_id"])
    for file in (directory / "config.json", directory / "generation_config.json"):
        values = json.loads(file.read_text("utf-8"))
        values = {key: value for key, value in values.items() if not key.endswith("_token_id")}
        file.write_text(json.dumps(values | found, indent=2), "utf-8")
