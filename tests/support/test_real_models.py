"""Real models and tokenizers are what they are called."""

from pathlib import Path

import pytest

from slmops.infra.reference.answers import Question
from slmops.infra.transformers.calls import AnswerAsSource
from tests.support.family_checkpoints import REAL_FAMILIES, family_checkpoint, is_left_out
from tests.support.real_models import VOCABULARIES, real_model
from tests.support.real_tokenizers import MISTRAL_V3, MISTRAL_WHEEL
from tests.support.torch_process import TORCH_PROCESS

BETWEEN = "\n__ggml_vocab_test__\n"  # texts of a .inp file
CAPITAL = Question(id=1, messages=({"role": "user", "content": "What is the capital of France?"},))


@pytest.mark.parametrize("name", ["smollm2", "smollm2-off-grid"])
def test_smollm2_knows_the_capital_of_france(name: str, tmp_path: Path) -> None:
    asked = AnswerAsSource(
        checkpoint_dir=real_model(name),
        rows=(CAPITAL,),
        max_new_tokens=10,
        max_positions=1,
        batch_size=1,
        threads=1,
        output_dir=tmp_path,
    )
    child = TORCH_PROCESS.run(asked, deadline_s=120, log_path=tmp_path / "log", work_dir=tmp_path)
    assert child.value.rows[0].answer == "The capital of France is Paris."


def texts_of(vocabulary: Path) -> list[str]:
    return Path(f"{vocabulary}.inp").read_text("utf-8").removesuffix(BETWEEN).split(BETWEEN)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_tokenizer_of_a_vocabulary_gives_the_ids_of_the_familys_own(name: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(real_model(f"tokenizers/{name}") / "tokenizer.json"))
    vocabulary = real_model("llama-cpp-models") / f"ggml-vocab-{name}.gguf"
    texts = texts_of(vocabulary)
    ids = [[int(number) for number in line.split()] for line in Path(f"{vocabulary}.out").read_text().splitlines()]
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in texts] == ids
    assert len(texts) > 40


def test_mistrals_tokenizer_gives_the_ids_of_its_sentencepiece_model(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    MISTRAL_WHEEL.unpack(MISTRAL_V3, tmp_path / "tokenizer.model")
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(real_model("tokenizers/mistral-v0.3") / "tokenizer.json"))
    texts = texts_of(real_model("llama-cpp-models") / "ggml-vocab-llama-spm.gguf")
    for text in [text for text in texts if not text.startswith(" ")]:  # the Hub's form adds no second space there
        assert tokenizer.encode(text, add_special_tokens=False).ids == pieces.encode(text), text


NAMES = [name for name, family in REAL_FAMILIES.items() if (family.added or family.eos) and not is_left_out(name)]


@pytest.mark.parametrize("name", NAMES)
def test_a_family_checkpoint_ends_turns_with_a_token_of_its_real_tokenizer(name: str) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    folder = family_checkpoint(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert tokenizer.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id
    assert "Hi" in prompt
    controls = [token for token in tokenizer.get_added_vocab() if token in prompt]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert {tokenizer.convert_tokens_to_ids(token) for token in controls} <= {*ids}
