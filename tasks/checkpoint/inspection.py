"""The inspection of a checkpoint, an adapter or a given model by its files, before anything runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from slmops.infra.checkpoints.dequantization import MARK
from slmops.infra.checkpoints.folder import (
    TOKENIZER_FILES,
    TensorHeader,
    read_chat_template,
    read_json,
    read_tensor_headers,
)
from slmops.infra.checkpoints.generation_config import check_generation_config
from slmops.infra.checkpoints.quantized import float_headers, quantization_of
from slmops.infra.checkpoints.text_part import is_multimodal, text_config_of, text_headers, text_names
from slmops.infra.checkpoints.tying import EMBEDDING, LM_HEAD, are_equal, headers_as_tied, says_tied
from slmops.infra.checkpoints.vocabulary import tokens_without_rows
from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import BYTE_ORDER_MARK, check_files
from slmops.infra.gguf.architectures import config_of, tensors_of
from slmops.infra.gguf.conversion import ORIGIN_FILE, written_as
from slmops.infra.gguf.file import gguf_of, read_gguf
from slmops.infra.gguf.tokenizer import check_tokenizer
from slmops.infra.model_screening import screen_model
from slmops.infra.olive.architectures import (
    LONGROPE_ORIGINAL_LENGTH,
    architecture_of,
    check_architecture,
    passes_original_length,
)
from slmops.infra.records import Json, Record
from slmops.infra.storage.manifest import check_paths, digest_of, digest_of_file
from slmops.tasks.checkpoint.shapes import check_shapes, size_of
from slmops.tasks.request.parameters import Precision

SENTENCEPIECE = "tokenizer.model"
EVALUATION_FILE = "eval.jsonl"
OUTPUT_SCHEMA_FILE = "output_schema.json"

# The files that a checkpoint's digest covers: all that influence the model's answers. Model cards, training states, the
# evaluation file and the output schema do not.
CONTENT_SUFFIXES = (".safetensors", ".onnx", ".data", ".model", ".jinja", ".txt", ".json")
NOT_CONTENT = (
    *("README", "LICENSE", OUTPUT_SCHEMA_FILE),
    *("trainer_state.json", "training_args.bin", "all_results.json", "train_results.json"),
)


class Inspection(Record):
    """The facts about a checkpoint in its files' headers."""

    kind: Literal["checkpoint", "adapter", "genai"]
    architecture: str
    parameters: int
    dtype: str
    size_bytes: int
    largest_tensor_elements: int
    vocabulary_size: int
    hidden_size: int
    context_length: int
    tied_embeddings: bool = True
    own_lm_head: bool = False  # though config.json says that it is the embedding's
    multimodal: bool = False
    quantized: Precision | None = None  # the one precision that it can be built at
    warnings: tuple[str, ...] = ()


def inspect_checkpoint(folder: Path, *, chat_template_given: bool = False) -> Inspection:
    """Inspect a checkpoint folder, an adapter folder or an onnxruntime-genai folder without running any of it.

    A GGUF file, or a folder with nothing else, is inspected as the checkpoint that it is converted to.

    Raises `BadInput` for anything that cannot be deployed: no or broken config, an unsupported architecture,
    damaged or pickled weights, shapes that disagree with the config, no tokenizer, no chat template, and an
    onnxruntime-genai folder that names code or files elsewhere (`slmops.infra.model_screening`).
    """
    if not folder.exists():
        raise BadInput(
            f"There is no checkpoint at {folder}.",
            "Give a folder, a Hub id (owner/name) or an s3:// folder.",
            code="checkpoint-missing",
        )
    if (gguf := gguf_of(folder)) is not None:
        return _inspect_gguf(gguf, chat_template_given)
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is a file, not a checkpoint folder.",
            "Give the folder that holds config.json, or a GGUF file.",
            code="checkpoint-is-file",
        )
    check_files(sorted(folder.iterdir()))
    if (folder / "genai_config.json").is_file():
        return _inspect_genai(folder, chat_template_given)
    if (folder / "adapter_config.json").is_file():
        return _inspect_adapter(folder)
    return _inspect_whole(folder, chat_template_given)


def _inspect_whole(folder: Path, chat_template_given: bool) -> Inspection:
    config = read_json(folder / "config.json")
    quantization = quantization_of(config | _mark_of_dequantization(folder))
    config.pop("quantization_config", None)
    check_architecture(config)
    check_tokenizer_files(folder, chat_template_given)
    check_generation_config(folder)
    stored, warnings = read_tensor_headers(folder), _warnings_of_conversion(folder)
    headers = stored
    if quantization:
        headers = float_headers(headers, quantization)
        warnings.append(
            f"The checkpoint is quantized already ({quantization.method}, {quantization.bits} bits): it is built at "
            f"{quantization.precision} as it is, and compared with the numbers that its weights stand for."
        )
    if "auto_map" in config:
        warnings.append("The checkpoint contains its own code (auto_map); slmops never runs it.")
    if not chat_template_given and (read_chat_template(folder) or "").startswith(BYTE_ORDER_MARK):
        warnings.append(
            "The chat template begins with a byte order mark, which is a part of every prompt, as in transformers. "
            "If the model was trained without it, give the template with --chat-template."
        )
    if multimodal := is_multimodal(config):
        warnings.append(
            f"{config['architectures'][0]} is a multi-modal model: only its text part is built, which takes no images."
        )
        config, headers = text_config_of(config, headers), text_headers(headers)
        check_architecture(config)
    names = text_names(stored) if multimodal else {name: name for name in stored}
    if own_lm_head := says_tied(config) and {EMBEDDING, LM_HEAD} <= headers.keys() and not _is_shared(folder, names):
        config = config | {"tie_word_embeddings": False}
        warnings.append(
            "config.json says that embedding and lm_head are one matrix (tie_word_embeddings), and the weights have an "
            "lm_head that differs: it is built as it is in the weights, as transformers loads it."
        )
    elif says_tied(config):
        headers = headers_as_tied(headers)
    embedding = check_shapes(folder, config, headers)
    warnings += _check_vocabulary(folder, embedding.shape[0])
    inspection = _inspection_of(config, headers, embedding, warnings, multimodal=multimodal, own_lm_head=own_lm_head)
    return inspection.model_copy(update={"quantized": quantization.precision}) if quantization else inspection


def _is_shared(folder: Path, names: Mapping[str, str]) -> bool:
    """Whether lm_head is the embedding's matrix, saved twice; packed weights are not compared."""
    return {EMBEDDING, LM_HEAD} <= names.keys() and are_equal(folder, names[EMBEDDING], names[LM_HEAD])


def _inspect_gguf(path: Path, chat_template_given: bool) -> Inspection:
    file = read_gguf(path)
    config = config_of(file)
    check_architecture(config)
    headers = {tensor.name: TensorHeader(tensor.source.shape, written_as(file, tensor)) for tensor in tensors_of(file)}
    embedding = check_shapes(path, config, headers)
    check_tokenizer(file)
    if not chat_template_given and not isinstance(file.metadata.get("tokenizer.chat_template"), str):
        raise _no_chat_template(path)
    return _inspection_of(config, headers, embedding, quantized_twice(file.quantization))


def _inspection_of(
    config: Json,
    headers: dict[str, TensorHeader],
    embedding: TensorHeader,
    warnings: list[str],
    *,
    multimodal: bool = False,
    own_lm_head: bool = False,
) -> Inspection:
    if passes_original_length(config):
        warnings.append(
            f"Where a conversation grows beyond {LONGROPE_ORIGINAL_LENGTH} tokens while the model answers, one step of "
            "the answer is wrong: the runtime changes the rotary embedding one step late."
        )
    return Inspection(
        kind="checkpoint",
        architecture=architecture_of(config),
        parameters=sum(header.elements for header in headers.values()),
        dtype=max((header.dtype for header in headers.values()), key=[h.dtype for h in headers.values()].count),
        size_bytes=sum(header.size_bytes for header in headers.values()),
        largest_tensor_elements=max(header.elements for header in headers.values()),
        vocabulary_size=size_of(config, "vocab_size", default=embedding.shape[0]),
        hidden_size=size_of(config, "hidden_size", default=embedding.shape[1]),
        context_length=size_of(config, "max_position_embeddings", default=0),
        tied_embeddings=LM_HEAD not in headers,
        own_lm_head=own_lm_head,
        multimodal=multimodal,
        warnings=tuple(warnings),
    )


def _mark_of_dequantization(folder: Path) -> Json:
    """Return the `quantization_config` that a dequantized checkpoint had, in an object; empty for any other."""
    return {"quantization_config": read_json(folder / MARK)} if (folder / MARK).is_file() else {}


def _warnings_of_conversion(folder: Path) -> list[str]:
    """Return the warnings about a checkpoint that was converted from a GGUF file."""
    origin = read_json(folder / ORIGIN_FILE) if (folder / ORIGIN_FILE).is_file() else {}
    return quantized_twice(origin.get("quantization"))


def quantized_twice(quantization: str | None) -> list[str]:
    """Return the warning about a GGUF file with quantized weights, if they are."""
    if quantization is None:
        return []
    return [
        f"The weights of the GGUF file are quantized already ({quantization}): int8 and int4 quantize them a second "
        "time, and every variant is compared with what the first time left. Deploy the checkpoint that the file was "
        "made from where you have it."
    ]


def _inspect_genai(folder: Path, chat_template_given: bool) -> Inspection:
    config = read_json(folder / "genai_config.json")
    model = _section(config, "model")
    decoder = _section(model, "decoder")
    file = decoder.get("filename")
    if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
        raise BadInput(
            f"{folder} has a genai_config.json without its ONNX model (model.decoder.filename: {file!r}).",
            "Give the whole folder that the model builder wrote.",
            code="genai-model-missing",
        )
    screen_model(folder)
    check_paths(path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    check_tokenizer_files(folder, chat_template_given)
    return Inspection(
        kind="genai",
        architecture=str(model.get("type", "unknown")),
        parameters=0,
        dtype="onnx",
        size_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        largest_tensor_elements=0,
        vocabulary_size=size_of(model, "vocab_size", default=0),
        hidden_size=size_of(decoder, "hidden_size", default=0),
        context_length=size_of(model, "context_length", default=0),
    )


def _section(config: Json, key: str) -> Json:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _inspect_adapter(folder: Path) -> Inspection:
    config = read_json(folder / "adapter_config.json")
    if (folder / "adapter_model.safetensors").is_file():
        headers = read_tensor_headers(folder, "adapter_model.safetensors")
    elif (folder / "adapter_model.bin").is_file():
        raise BadInput(
            f"{folder} has its weights as adapter_model.bin only, a pickle, which can run code when it is loaded.",
            "Save the adapter as safetensors: model.save_pretrained(folder).",
            code="weights-pickled",
        )
    else:
        raise BadInput(
            f"{folder} has no adapter_model.safetensors.", "Save the adapter again.", code="adapter-without-weights"
        )
    return Inspection(
        kind="adapter",
        architecture=str(config.get("peft_type", "unknown")),
        parameters=sum(header.elements for header in headers.values()),
        dtype=next((header.dtype for header in headers.values()), "F32"),
        size_bytes=sum(header.size_bytes for header in headers.values()),
        largest_tensor_elements=max((header.elements for header in headers.values()), default=0),
        vocabulary_size=0,
        hidden_size=0,
        context_length=0,
    )


def check_tokenizer_files(folder: Path, chat_template_given: bool) -> None:
    """Raise `BadInput` for a folder without a usable tokenizer, or without a chat template if none is given."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BadInput(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}).",
            "Save it beside the weights: tokenizer.save_pretrained(folder).",
            code="tokenizer-missing",
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES if name != SENTENCEPIECE):
        raise BadInput(
            f"{folder} has its tokenizer as {SENTENCEPIECE} only, which transformers 5 converts into other tokens.",
            "Convert it with the transformers 4 that the model was trained with (pip install 'transformers<5' "
            "sentencepiece): AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes tokenizer.json.",
            code="tokenizer-not-converted",
        )
    if not chat_template_given and read_chat_template(folder) is None:
        raise _no_chat_template(folder)


def _no_chat_template(checkpoint: Path) -> BadInput:
    return BadInput(
        f"The tokenizer in {checkpoint} has no chat template.",
        "Pass the one that the model was trained with: --chat-template FILE (Jinja, as in chat_template.jinja).",
        code="chat-template-missing",
    )


def _check_vocabulary(folder: Path, rows: int) -> list[str]:
    """Refuse needed tokens without a row in the embedding; return a warning about tokens that no prompt needs."""
    needed, spare = tokens_without_rows(folder, rows)
    if needed:
        raise BadInput(
            f"The tokenizer in {folder} has {len(needed) + len(spare)} tokens beyond the {rows} rows of the embedding, "
            f"first {needed[0]!r}.",
            "Resize before training (model.resize_token_embeddings(len(tokenizer))), or save the tokenizer that the "
            "model was trained with.",
            code="vocabulary-larger-than-embedding",
        )
    return [f"The token {spare[0]!r} has no row in the embedding: no prompt may contain it."] if spare else []


def digest_with_rows(folder: Path) -> str:
    """Return the SHA-256 (hex) over a checkpoint's content, and the files for its deploy that lie beside it."""
    beside = (folder / name for name in (EVALUATION_FILE, OUTPUT_SCHEMA_FILE) if (folder / name).is_file())
    return digest_of({"content": content_digest(folder), **{path.name: digest_of_file(path) for path in beside}})


def content_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) over the names and bytes of the files that influence the model's answers."""
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in CONTENT_SUFFIXES and not path.name.startswith(NOT_CONTENT)
    )
    return digest_of({path.name: digest_of_file(path) for path in paths})
