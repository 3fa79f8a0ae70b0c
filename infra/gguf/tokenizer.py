"""A GGUF file's tokenizer in the Hub's form: tokenizer.json, tokenizer_config.json and the chat template.

The ids are those of the family's own tokenizer (tests/infra/gguf/test_tokenizer.py compares them with llama.cpp's test
vectors, which come from it).
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from slmops.infra.errors import BadInput
from slmops.infra.gguf.file import GgufFile, Parsed

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of tokens; 1 is a plain one, 6 a byte
PADDING = re.compile(r"\[PAD\d+\]")  # llama.cpp's name for rows of the embedding without a token
SPACE = "▁"
WHITE_SPACE = ("\n", SPACE, "\t")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN_2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _REST_WITH_SLASH
)
GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _REST_WITH_SLASH
)
# `tokenizer.ggml.pre` -> the steps that split a text into words.
WORDS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2", "smaug-bpe", "dbrx"), LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN_2),
    "tekken": TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), GPT_4O),
}
DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r")  # single digits, then as GPT-2
AS_GEMMA = ("gemma4", "granite-embed-multi-311m")
AS_GPT_2 = ("gpt-2", "phi-2", "olmo")
# In these, a word that is a token is not built by merges.
IGNORING_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2", "tekken")
BEGINNING = IGNORING_MERGES  # in these, texts begin with the begin token unless the file says otherwise


def save_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder.

    Raises `BadInput` for a file without one, or with one of an unknown kind.
    """
    from tokenizers import Tokenizer

    described = tokenizer_of(file)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # the library raises nothing narrower
        raise _unfit(file, f"its tokens do not make a tokenizer: {error}") from None
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config_of(file), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config, "utf-8", newline="\n")


def check_tokenizer(file: GgufFile) -> None:
    """Raise `BadInput` unless the file has a tokenizer of a known kind, with a row in the embedding for each token."""
    model = file.metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama", "gemma4"):
        raise _unfit(file, f"its tokenizer is of the kind {model!r}")
    tokens, _ = _tokens(file)
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        token_id(file, name)
    embedding = file.tensors.get("token_embd.weight")
    if embedding and len(tokens) > embedding.shape[0]:
        raise _unfit(file, f"it has {len(tokens)} tokens and {embedding.shape[0]} rows in its embedding")
    _given_merges(file, tokens)
    if model == "gpt2" and not _is_gemma(file):
        _word_steps(file)


def tokenizer_of(file: GgufFile) -> Parsed:
    """Return the tokenizer.json of a GGUF file."""
    check_tokenizer(file)
    parts = _sentencepiece if file.metadata["tokenizer.ggml.model"] == "llama" or _is_gemma(file) else _byte_level
    tokens, kinds = _tokens(file)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(file, tokens, kinds)),
        "post_processor": _post_processor(file, tokens),
        **parts(file, tokens),
    }


def tokenizer_config_of(file: GgufFile) -> Parsed:
    """Return the tokenizer_config.json of a GGUF file, chat template included."""
    tokens, _ = _tokens(file)
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: token_id(file, key) for name, key in named.items()}
    template = file.metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": _class_of(file),
        **{name: tokens[number] for name, number in ids.items() if number is not None},
        "add_bos_token": _begins(file),
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.get(f"{file.architecture}.context_length", int),
        **({"chat_template": template} if isinstance(template, str) else {}),
    }


def token_id(file: GgufFile, name: str) -> int | None:
    """Return the id of a token such as `bos` or `eos`; None if there is none. Raises `BadInput` for an invalid id."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    number, count = file.get(key, int), len(file.get("tokenizer.ggml.tokens", tuple))
    if not 0 <= number < count:
        raise _unfit(file, f"{key} is {number}, and it has {count} tokens")
    return number


def _is_gemma(file: GgufFile) -> bool:
    """Whether its tokens are Gemma's: cut at spaces, which are part of the token behind them. Converted from a
    tokenizer.json alone, it is called a byte-level one of another kind."""
    pre, model = _pre(file), file.metadata.get("tokenizer.ggml.model")
    return model == "gemma4" or pre in AS_GEMMA or (model == "llama" and file.architecture.startswith("gemma"))


def _pre(file: GgufFile) -> str:
    return file.get("tokenizer.ggml.pre", str, "default")


def _class_of(file: GgufFile) -> str:
    if _is_gemma(file):
        return "GemmaTokenizer"
    return "Qwen2Tokenizer" if _pre(file) == "qwen2" else "PreTrainedTokenizerFast"


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    """Return the tokens and their types, without unused ones at the end."""
    tokens = list(file.get("tokenizer.ggml.tokens", tuple))
    kinds = list(file.get("tokenizer.ggml.token_type", tuple, (1,) * len(tokens)))
    if not tokens or len(kinds) != len(tokens) or not all(isinstance(token, str) and token for token in tokens):
        raise _unfit(file, f"it has {len(tokens)} tokens and {len(kinds)} types of tokens")
    while tokens and PADDING.fullmatch(tokens[-1]):
        del tokens[-1], kinds[-1]
    if _is_gemma(file):  # in these, tokens of several spaces are stored as spaces
        tokens = [SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]
    if len(set(tokens)) != len(tokens):
        raise _unfit(file, "a token occurs twice")
    return tokens, kinds


def _added(file: GgufFile, tokens: Sequence[str], kinds: Sequence[int]) -> Iterator[Parsed]:
    is_phi_3 = file.architecture == "phi3" and file.metadata["tokenizer.ggml.model"] == "llama"
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            # Phi-3's control tokens absorb the white space after them. No file says so; llama.cpp recognizes the name.
            takes_space = is_phi_3 and token not in ("<unk>", "<s>", "<|endoftext|>")
            yield {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": takes_space,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> Parsed:
    pre = _pre(file)
    return {
        "normalizer": {"type": "NFC"} if WORDS.get(pre) == QWEN_2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _word_steps(file)},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, _given_merges(file, tokens)) | {"ignore_merges": pre in IGNORING_MERGES},
    }


def _word_steps(file: GgufFile) -> list[Parsed]:
    """Return the steps that split a text into words, for a byte-level tokenizer."""
    pre = _pre(file)
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    as_gpt_2 = bytes_alone | {"use_regex": True}
    if pre in WORDS:
        cut = {"type": "Split", "pattern": {"Regex": WORDS[pre]}, "behavior": "Isolated", "invert": False}
        return [cut, bytes_alone]
    if pre in DIGITS_FIRST:
        return [{"type": "Digits", "individual_digits": True}, as_gpt_2]
    if pre in AS_GPT_2:
        return [as_gpt_2]
    raise _unfit(file, f"its pre-tokenizer {pre!r} is not known")


def _sentencepiece(file: GgufFile, tokens: Sequence[str]) -> Parsed:
    is_gemma = _is_gemma(file)
    begins_with_space = not is_gemma and file.get("tokenizer.ggml.add_space_prefix", bool, True)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}] if begins_with_space else []
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[Parsed] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if begins_with_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = token_id(file, "unknown") or 0
    fallback = {"byte_fallback": True, "fuse_unk": True, "unk_token": tokens[unknown]}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*steps, replaced]} if steps else replaced,
        "pre_tokenizer": split if is_gemma else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, _merges(file, tokens, in_order=is_gemma)) | fallback,
    }


def _bpe(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> Parsed:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocabulary, "merges": merges}


def _given_merges(file: GgufFile, tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Return the merges that the file has; the library fails on one that is not of two tokens to a third."""
    known = set(tokens)
    given: tuple[object, ...] = file.get("tokenizer.ggml.merges", tuple, ())
    pairs = [(left, right) for left, _, right in (str(merge).partition(" ") for merge in given)]
    for left, right in pairs:
        if not {left, right, left + right} <= known:
            raise _unfit(file, f"it merges {left!r} and {right!r}, which are not two tokens that make a third")
    return pairs


def _merges(file: GgufFile, tokens: Sequence[str], *, in_order: bool) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece model, the best first: every way to make a token of two others.

    A file may list them itself. A token's score is its rank. Gemma's tokens are in the order of their ranks instead,
    and its runs of white space precede them, longest first.
    """
    if given := _given_merges(file, tokens):
        return given
    scores = file.get("tokenizer.ggml.scores", tuple)
    if len(scores) < len(tokens):
        raise _unfit(file, f"it has {len(tokens)} tokens and {len(scores)} scores")
    ranked: list[tuple[float, int, int, int, str, str]] = []
    numbers = {token: number for number, token in enumerate(tokens)}
    for number, token in enumerate(tokens):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in numbers and right in numbers]
        rank = number if in_order else -scores[number]
        for left, right in known:
            if in_order and token == token[0] * len(token) and token[0] in WHITE_SPACE:
                ranked.append((-1, -len(left), -len(right), WHITE_SPACE.index(token[0]), left, right))
            else:
                ranked.append((rank, numbers[left], numbers[right], 0, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _begins(file: GgufFile) -> bool:
    begins = file.metadata["tokenizer.ggml.model"] == "llama" or _pre(file) in BEGINNING
    return file.get("tokenizer.ggml.add_bos_token", bool, begins)


def _post_processor(file: GgufFile, tokens: Sequence[str]) -> Parsed | None:
    number = token_id(file, "bos")
    if not _begins(file) or number is None:
        return None
    token = tokens[number]
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, *second],
        "special_tokens": special,
    }


def _unfit(file: GgufFile, fault: str) -> BadInput:
    return BadInput(
        f"The tokenizer of {file.path} cannot be converted: {fault}.",
        "Give the checkpoint that it was made from, in the Hub's layout.",
        code="gguf-tokenizer",
    )
