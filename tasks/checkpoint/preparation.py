"""Stage "inspect": what a checkpoint is, whether slmops can deploy it, and the digest of its content."""

import contextlib
import json
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import BaseModel, ConfigDict

from slmops.infra.checkpoints.folder import (
    TOKENIZER_FILES,
    TensorHeader,
    read_chat_template,
    read_json,
    read_tensor_headers,
)
from slmops.infra.checkpoints.hub import fetch_from_hub
from slmops.infra.checkpoints.s3 import FETCHED, fetch_from_s3
from slmops.infra.checkpoints.source import SourceKind, parse_checkpoint
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.genai.model_screening import screen_model
from slmops.infra.olive.architectures import check_architecture
from slmops.infra.process.call import OnProgress
from slmops.infra.process.slots import only_maker
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import link_or_copy, place, work_folder
from slmops.infra.storage.inputs import fetch_input, ingest, is_input_address
from slmops.infra.storage.manifest import Manifest, digest_of, digest_of_file
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.transformers.adapters import read_adapter_config
from slmops.infra.transformers.calls import MergeAdapter
from slmops.tasks.request.deploy_request import DeployRequest, read_chat_template_file
from slmops.tasks.request.inputs import inputs_dir
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage

EVALUATION_FILE = "eval.jsonl"
OUTPUT_SCHEMA_FILE = "output_schema.json"

# What a checkpoint's digest covers: all that decides what the model answers. Model cards, training
# states, the evaluation file and the output's schema may change without making it another model.
CONTENT_SUFFIXES = (".safetensors", ".onnx", ".data", ".model", ".jinja", ".txt", ".json")
NOT_CONTENT = (
    *("README", "LICENSE", OUTPUT_SCHEMA_FILE),
    *("trainer_state.json", "training_args.bin", "all_results.json", "train_results.json"),
)


# Far above any model's; a damaged config must not make us count for hours.
LARGEST_SIZE = 100_000_000
LARGEST_LAYERS = 10_000


class Inspection(BaseModel):
    """What is known of a checkpoint from its files' headers."""

    model_config = ConfigDict(frozen=True)

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
    warnings: tuple[str, ...] = ()


def inspect_checkpoint(folder: Path, *, chat_template_given: bool = False) -> Inspection:
    """Look at a checkpoint folder, an adapter folder or an onnxruntime-genai folder without running any of it.

    Raises `BadInput` for anything that cannot be deployed: no or broken config, an unsupported architecture,
    damaged or pickled weights, shapes that disagree with the config, no tokenizer, no chat template, and an
    onnxruntime-genai folder that names code or files elsewhere (`slmops.infra.genai.model_screening`).
    """
    if not folder.exists():
        raise BadInput(
            f"There is no checkpoint at {folder}.",
            "Give a folder, a Hub id (owner/name) or an s3:// folder.",
            code="checkpoint-missing",
        )
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is a file, not a checkpoint folder.",
            "Give the folder that holds config.json.",
            code="checkpoint-is-file",
        )
    if (folder / "genai_config.json").is_file():
        return _inspect_genai(folder, chat_template_given)
    if (folder / "adapter_config.json").is_file():
        return _inspect_adapter(folder)
    config = read_json(folder / "config.json")
    check_architecture(config)
    _check_tokenizer(folder, chat_template_given)
    headers = read_tensor_headers(folder)
    _check_shapes(folder, config, headers)
    warnings = []
    if "auto_map" in config:
        warnings.append("The checkpoint brings code of its own (auto_map); slmops never runs it.")
    return Inspection(
        kind="checkpoint",
        architecture=config["architectures"][0],
        parameters=sum(header.elements for header in headers.values()),
        dtype=max((header.dtype for header in headers.values()), key=[h.dtype for h in headers.values()].count),
        size_bytes=sum(header.size_bytes for header in headers.values()),
        largest_tensor_elements=max(header.elements for header in headers.values()),
        vocabulary_size=_size(config, "vocab_size"),
        hidden_size=_size(config, "hidden_size"),
        context_length=_size(config, "max_position_embeddings", default=0),
        tied_embeddings="lm_head.weight" not in headers,
        warnings=tuple(warnings),
    )


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
    _check_tokenizer(folder, chat_template_given)
    return Inspection(
        kind="genai",
        architecture=str(model.get("type", "unknown")),
        parameters=0,
        dtype="onnx",
        size_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        largest_tensor_elements=0,
        vocabulary_size=_size(model, "vocab_size", default=0),
        hidden_size=_size(decoder, "hidden_size", default=0),
        context_length=_size(model, "context_length", default=0),
    )


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _size(config: dict[str, Any], key: str, *, default: int | None = None) -> int:
    """Return a size that a config states; raises `BadInput` when it is missing without a default, or no size."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST_SIZE:
        raise BadInput(
            f"The config has {key}: {value!r}, which is no size.", "Save the checkpoint again.", code="size-not-valid"
        )
    return value


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


def _check_tokenizer(folder: Path, chat_template_given: bool) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BadInput(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}).",
            "Save it beside the weights: tokenizer.save_pretrained(folder).",
            code="tokenizer-missing",
        )
    if not chat_template_given and read_chat_template(folder) is None:
        raise BadInput(
            f"The tokenizer in {folder} has no chat template.",
            "Pass the one that the model was trained with: --chat-template FILE (Jinja, as in chat_template.jinja).",
            code="chat-template-missing",
        )


def _check_shapes(folder: Path, config: dict[str, Any], headers: dict[str, TensorHeader]) -> None:
    """Compare the weights with what config.json promises; the names are those of all supported architectures."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        found = headers.get(name)
        if found is None:
            raise BadInput(
                f"{folder} has no tensor {name}, which config.json calls for.",
                "The weights and config.json are not of the same model: save both again.",
                code="tensor-missing",
            )
        if found.shape != shape:
            raise BadInput(
                f"The tensor {name} in {folder} has shape {list(found.shape)}, config.json says {list(shape)}.",
                "The weights and config.json are not of the same model: save both again.",
                code="tensor-shape",
            )


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that a Llama-like config.json calls for (biases and norms left out)."""
    hidden, vocabulary = _size(config, "hidden_size"), _size(config, "vocab_size")
    intermediate, heads = _size(config, "intermediate_size"), _size(config, "num_attention_heads")
    layers = _size(config, "num_hidden_layers")
    if layers > LARGEST_LAYERS:
        raise BadInput(
            f"config.json has num_hidden_layers: {layers}.", "Save the checkpoint again.", code="layers-not-valid"
        )
    kv_heads = _size(config, "num_key_value_heads", default=heads)
    head_dim = _size(config, "head_dim", default=hidden // heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        if config.get("model_type") == "phi3":
            shapes[f"{prefix}.self_attn.qkv_proj.weight"] = ((heads + 2 * kv_heads) * head_dim, hidden)
            shapes[f"{prefix}.mlp.gate_up_proj.weight"] = (2 * intermediate, hidden)
        else:
            shapes[f"{prefix}.self_attn.q_proj.weight"] = (heads * head_dim, hidden)
            shapes[f"{prefix}.self_attn.k_proj.weight"] = (kv_heads * head_dim, hidden)
            shapes[f"{prefix}.self_attn.v_proj.weight"] = (kv_heads * head_dim, hidden)
            shapes[f"{prefix}.mlp.gate_proj.weight"] = (intermediate, hidden)
            shapes[f"{prefix}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
    if config.get("tie_word_embeddings") is False:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def content_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) over the names and bytes of the files that decide what the model answers."""
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in CONTENT_SUFFIXES and not path.name.startswith(NOT_CONTENT)
    )
    return digest_of({path.name: digest_of_file(path) for path in paths})


class PreparedCheckpoint(BaseModel):
    """A checkpoint that is ready to build from: where its folder is, what it is, and the digest of its content."""

    model_config = ConfigDict(frozen=True)

    uri: str
    origin: str
    digest: str
    inspection: Inspection

    @property
    def folder(self) -> Path:
        """The checkpoint's folder on this machine."""
        return folder_of(self.uri)


def folder_of(uri: str) -> Path:
    """Return the local folder that a `file://` URI names."""
    return Path(url2pathname(urlsplit(uri).path))


@stage("prepare checkpoint", run_name="prepare-{request.name}")
def prepare_checkpoint(request: DeployRequest, settings: Settings) -> PreparedCheckpoint:
    """Fetch the checkpoint if it is remote, merge it if it is an adapter, give it its chat template, and digest it.

    Raises `BadInput` for whatever cannot be deployed.
    """
    with stage_progress("inspect") as on_progress:
        template = read_chat_template_file(Path(request.chat_template_file)) if request.chat_template_file else None
        folder = fetch_checkpoint(request.checkpoint, request.revision, settings, on_progress)
        inspection = inspect_checkpoint(folder, chat_template_given=template is not None)
        if inspection.kind == "adapter":
            folder = merge_into_base(folder, request.base, settings, on_progress)
            inspection = inspect_checkpoint(folder, chat_template_given=template is not None)
        if template is not None:
            folder = with_chat_template(folder, template, settings)
        on_progress(0.5, 1, "reading the weights for their digest")
        digest = content_digest(folder)
    return PreparedCheckpoint(
        uri=folder.absolute().as_uri(), origin=request.checkpoint, digest=digest, inspection=inspection
    )


@stage("share checkpoint", run_name="share-checkpoint")
def put_into_store(prepared: PreparedCheckpoint, registry: ModelRegistry) -> str:
    """Put a prepared checkpoint into the store, where every worker can read it, and return its address."""
    with stage_progress("share") as on_progress:
        return ingest(registry, prepared.folder, on_progress).address


@stage("fetch checkpoint", run_name="fetch-checkpoint")
def fetched_from_store(address: str, digest: str, settings: Settings) -> PreparedCheckpoint:
    """Return a checkpoint that another machine has prepared and shared; its content must have the digest.

    Raises `StageFailed` where it has another one.
    """
    with stage_progress("fetch") as on_progress:
        folder = fetch_input(open_registry(settings), address, inputs_dir(settings), on_progress)
        found = content_digest(folder)
    if found != digest:
        raise StageFailed(
            f"{address} has the digest {found}, not {digest}.",
            "Deploy its checkpoint again.",
            code="checkpoint-changed",
        )
    inspection = inspect_checkpoint(folder, chat_template_given=True)
    return PreparedCheckpoint(uri=folder.absolute().as_uri(), origin=address, digest=digest, inspection=inspection)


def prepare_source(manifest: Manifest, settings: Settings) -> PreparedCheckpoint:
    """Return the checkpoint that a version was built from, wherever it is kept on this machine.

    Raises `BadInput` when it is gone or has changed since.
    """
    if is_input_address(manifest.source.origin):
        with contextlib.suppress(BadInput):  # removed from the store; it may be here still
            fetch_input(open_registry(settings), manifest.source.origin, inputs_dir(settings))
    folders = [settings.cache_dir / "checkpoints", inputs_dir(settings)]
    prepared = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    prepared += (settings.cache_dir / "s3").glob(f"*/{FETCHED}")
    for folder in (Path(manifest.source.origin).expanduser(), *prepared):
        if folder.is_dir() and content_digest(folder) == manifest.source.digest:
            inspection = inspect_checkpoint(folder, chat_template_given=True)
            uri = folder.absolute().as_uri()
            return PreparedCheckpoint(
                uri=uri, origin=manifest.source.origin, digest=manifest.source.digest, inspection=inspection
            )
    raise BadInput(
        f"The checkpoint of {manifest.reference} ({manifest.source.origin}) is gone or was changed.",
        "Deploy the checkpoint again; or, where its last verdict is enough, judge it on the rows of that (without "
        f"--eval), or trust its origin: slmops promote {manifest.reference}.",
        code="checkpoint-gone",
    )


def fetch_checkpoint(text: str, revision: str | None, settings: Settings, on_progress: OnProgress) -> Path:
    """Return the local folder of a checkpoint, after fetching it where it is a Hub id or an `s3://` folder."""
    source = parse_checkpoint(text, revision)
    if source.kind is SourceKind.HUB:
        return fetch_from_hub(source.location, source.revision, settings, on_progress=on_progress)
    if source.kind is SourceKind.S3:
        on_progress(0, 1, f"fetching {source.location}")
        return fetch_from_s3(source.location, settings, settings.cache_dir / "s3", on_progress)
    if source.kind is SourceKind.STORE:
        on_progress(0, 1, f"fetching {source.location}")
        return fetch_input(open_registry(settings), source.location, inputs_dir(settings), on_progress)
    return Path(source.location)


def merge_into_base(adapter: Path, base: str | None, settings: Settings, on_progress: OnProgress) -> Path:
    """Return the folder of an adapter merged into its base; merged once per content of the two."""
    declared = base or read_adapter_config(adapter)
    if not declared:
        raise BadInput(
            f"{adapter} does not say which base it belongs to.", "Name it with --base.", code="adapter-base-unknown"
        )
    base_folder = fetch_checkpoint(declared, None, settings, on_progress)
    if inspect_checkpoint(base_folder, chat_template_given=True).kind != "checkpoint":
        raise BadInput(
            f"The base {declared} is not a whole checkpoint.",
            "Name the model that was fine-tuned.",
            code="adapter-base-not-whole",
        )
    key = digest_of({"adapter": content_digest(adapter), "base": content_digest(base_folder)})
    merged = settings.cache_dir / "checkpoints" / key
    with only_maker(merged, on_progress):
        if merged.is_dir():
            return merged
        with work_folder(settings) as work:
            run_in_child(
                MergeAdapter(adapter_dir=adapter, base_dir=base_folder, output_dir=work / "merged"),
                deadline_s=settings.timeout.merge_s,
                log_path=settings.cache_dir / "logs" / f"merge-{key[:12]}.log",
                work_dir=work,
                on_progress=on_progress,
            )
            place(work / "merged", merged)
    return merged


def with_chat_template(folder: Path, template: str, settings: Settings) -> Path:
    """Return a folder with a checkpoint's files and another chat template; the weights are linked, not copied."""
    key = digest_of({"checkpoint": content_digest(folder), "chat_template": template})
    target = settings.cache_dir / "checkpoints" / key
    if target.is_dir():
        return target
    with work_folder(settings) as work:
        aside = work / "checkpoint"
        aside.mkdir()
        for path in folder.iterdir():
            if path.is_file() and path.name not in (
                "chat_template.jinja",
                "chat_template.json",
                "tokenizer_config.json",
            ):
                link_or_copy(path, aside / path.name)
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        config["chat_template"] = template  # the runtimes read it here, transformers in either place
        (aside / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
        place(aside, target)
    return target
