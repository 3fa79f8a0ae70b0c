"""Small tokenizers made in the manner of model families, with their chat templates: what parity is about."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.checkpoints import SENTENCES
from tests.tasks.chat_templates import TEMPLATES

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA_3_WORDS.replace("{1,3}", "")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclass(frozen=True)
class Family:
    """How a family's tokenizer works: `kind` is the manner of its pre-tokenizer, `added` its control tokens.

    `begins` says whether the tokenizer puts the begin token before a text by itself, `eats_space` whether control
    tokens swallow the white space behind them, `plain_marks` is what looks like control tokens and is text.
    """

    template: str
    kind: str
    tokenizer_class: str
    bos: str | None
    eos: str
    added: tuple[str, ...] = ()
    begins: bool = False
    eats_space: bool = False
    refuses_system: bool = False
    plain_marks: tuple[str, ...] = field(default=())


_LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SENTENCEPIECE = ("<unk>", "<s>", "</s>")
_PHI_3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_GRANITE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
_BPE = "PreTrainedTokenizerFast"

FAMILIES = {
    "chatml": Family("chatml", "qwen", "Qwen2Tokenizer", None, "<|im_end|>", _CHATML),
    "qwen2.5": Family("qwen2.5", "qwen", "Qwen2Tokenizer", None, "<|im_end|>", _CHATML),
    "qwen3": Family("qwen3", "qwen", "Qwen2Tokenizer", None, "<|im_end|>", (*_CHATML, "<think>", "</think>")),
    "llama-3": Family("llama-3", "llama-3", _BPE, "<|begin_of_text|>", "<|eot_id|>", _LLAMA_3, begins=True),
    "llama-3.2": Family("llama-3.2", "llama-3", _BPE, "<|begin_of_text|>", "<|eot_id|>", _LLAMA_3, begins=True),
    "smollm3": Family(
        "smollm3", "llama-3", _BPE, None, "<|im_end|>", (*_LLAMA_3, "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    ),
    "granite": Family("granite", "gpt-2", "GPT2Tokenizer", "<|end_of_text|>", "<|end_of_text|>", _GRANITE),
    "phi-3": Family("phi-3", "llama", _BPE, "<s>", "<|end|>", (*_SENTENCEPIECE, *_PHI_3), eats_space=True),
    "mistral-v0.1": Family(
        "mistral-v0.1", "llama", _BPE, "<s>", "</s>", _SENTENCEPIECE, begins=True, plain_marks=("[/INST]", "[INST]")
    ),
    "mistral-v0.3": Family(
        "mistral-v0.3", "llama", _BPE, "<s>", "</s>", (*_SENTENCEPIECE, "[INST]", "[/INST]"), begins=True
    ),
    "zephyr": Family(
        "zephyr", "llama", _BPE, "<s>", "</s>", _SENTENCEPIECE, plain_marks=("<|assistant|>", "<|system|>", "<|user|>")
    ),
    "gemma-2": Family(
        "gemma-2", "gemma", "GemmaTokenizer", "<bos>", "<end_of_turn>", _GEMMA, True, refuses_system=True
    ),
    "gemma-3": Family("gemma-3", "gemma", "GemmaTokenizer", "<bos>", "<end_of_turn>", _GEMMA, True),
}


def save_tokenizer(directory: Path, family: Family) -> Path:
    """Save a trained tokenizer in the family's manner, with its chat template, and return the folder."""
    from transformers import PreTrainedTokenizerFast

    core = _trained(family)
    if family.begins:
        core.post_processor = _begin_with(core, str(family.bos))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token="<unk>" if "<unk>" in family.added else None,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = (TEMPLATES / f"{family.template}.jinja").read_text("utf-8")
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    config |= {"tokenizer_class": family.tokenizer_class}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


def save_variant(directory: Path, model_dir: Path, tokenizer_dir: Path) -> Path:
    """Copy a genai folder to `directory` with another tokenizer, saved again by transformers as the builder does."""
    from transformers import AutoTokenizer

    shutil.copytree(model_dir, directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "genai_config.json").read_text("utf-8"))
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    config["model"] |= {"bos_token_id": begin, "eos_token_id": tokenizer.eos_token_id}
    (directory / "genai_config.json").write_text(json.dumps(config), "utf-8")
    return directory


def _trained(family: Family) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def words(pattern: str) -> Any:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    pieces = family.kind in ("llama", "gemma")
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>") if pieces else models.BPE())
    if pieces:
        # SentencePiece merges neither digits nor punctuation with letters.
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="never"),
                pre_tokenizers.Punctuation(),
                pre_tokenizers.Digits(individual_digits=True),
            ]
        )
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*family.added, *BYTES], show_progress=False)
    else:
        core.pre_tokenizer = {
            "qwen": words(QWEN_WORDS),
            "llama-3": words(LLAMA_3_WORDS),
            "gpt-2": pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        }[family.kind]
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    core.train_from_iterator(SENTENCES * 4, trainer)
    if family.kind == "qwen":
        core.normalizer = normalizers.NFC()
    elif family.kind == "llama":
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif family.kind == "gemma":
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        core.normalizer = normalizers.Replace(" ", "▁")
    if pieces:
        core = _without_byte_controls(core)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        # onnxruntime-genai puts a space before every text when it finds this step.
        core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if family.kind == "llama" else steps)
    eats = family.added[3:] if family.eats_space else ()
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=token in eats) for token in family.added]
    )
    return core


def _without_byte_controls(core: Any) -> Any:
    """Bytes are tokens of the vocabulary, but no added ones: a text <0x41> is not the letter A."""
    from tokenizers import Tokenizer

    described = json.loads(core.to_str())
    described["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(described))


def _begin_with(core: Any, token: str) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, core.token_to_id(token))]
    )
