"""Tokenizers from GGUF files give the same ids as those of the families, by llama.cpp's test vectors and real files."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from slmops.infra.errors import BadInput
from slmops.infra.gguf.file import read_gguf
from slmops.infra.gguf.tokenizer import tokenizer_config_of, tokenizer_of
from tests.support.errors import coded
from tests.support.real_models import real_model

VOCABULARIES = ("gemma-4", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder")
OTHERS = ("aquila", "bert-bge", "deepseek-llm", "falcon")
BETWEEN = "\n__ggml_vocab_test__\n"  # texts of a .inp file
TEXTS = (
    *(character * count for character in " \n\t" for count in (*range(1, 40), 70)),
    "Digits 3.14159, 2026 and ٣٤; fractions ½²; naïve café, 東京.",
    "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
    "def add(a, b):\n    return a + b\n\n\n\tprint(add(1, 2))  # three",
)


def converted(vocabulary: Path) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_of(read_gguf(vocabulary))))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_ids_are_those_of_the_familys_own_tokenizer(name: str) -> None:
    vocabulary = real_model("llama-cpp-models") / f"ggml-vocab-{name}.gguf"
    tokenizer = converted(vocabulary)
    texts = Path(f"{vocabulary}.inp").read_text("utf-8").removesuffix(BETWEEN).split(BETWEEN)
    ids = [[int(number) for number in line.split()] for line in Path(f"{vocabulary}.out").read_text().splitlines()]
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in texts] == ids
    assert len(texts) > 40


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(BadInput, check=coded("gguf-tokenizer")):
        converted(real_model("llama-cpp-models") / f"ggml-vocab-{name}.gguf")


def test_gemmas_is_the_real_one() -> None:
    file = read_gguf(real_model("gemma3-270m.gguf"))
    found = Tokenizer.from_str(json.dumps(tokenizer_of(file)))
    real = Tokenizer.from_file(str(real_model("tokenizers/gemma3") / "tokenizer.json"))
    assert [found.encode(text).ids for text in TEXTS] == [real.encode(text).ids for text in TEXTS]


def test_smollm2s_is_the_real_one_with_its_template() -> None:
    file = read_gguf(real_model("smollm2.gguf"))
    found, config = Tokenizer.from_str(json.dumps(tokenizer_of(file))), tokenizer_config_of(file)
    real = Tokenizer.from_file(str(real_model("smollm2") / "tokenizer.json"))
    assert [found.encode(text).ids for text in TEXTS] == [real.encode(text).ids for text in TEXTS]
    assert config["chat_template"] == (real_model("smollm2") / "chat_template.jinja").read_text("utf-8")
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
