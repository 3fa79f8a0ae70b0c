"""Merge a LoRA adapter into its base with peft."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.call import Progress
from slmops.infra.records import Untyped
from slmops.infra.transformers.calls import MergeAdapter, Merged
from slmops.infra.transformers.tokenizer import load_tokenizer

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# AutoTokenizer reads a folder with any of these files as that of a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
VOCABULARY_LAYERS = ("embed_tokens", "lm_head", "wte")
COMPARED_TOKENS = 32
LARGEST_DISTANCE = 1e-3  # difference of two logits in standard deviations; a merge in float32 stays below 1e-5
EVALUATION_FILES = ("eval.jsonl", "output_schema.json")


def read_adapter_config(adapter_dir: Path) -> str | None:
    """Return the base (path or Hub id) that the LoRA adapter in `adapter_dir` declares, or None.

    Raises `BadInput` if adapter_config.json is missing, is not a JSON object, is not of a LoRA adapter or names code.
    """
    path = adapter_dir / ADAPTER_CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise BadInput(
            f"{path} has peft_type {config.get('peft_type')!r}.",
            "Only LORA adapters can be merged.",
            code="adapter-kind",
        )
    if named := _named_code(config):
        raise BadInput(
            f"{path} names code to run: {named}.",
            "Train it on a model of transformers' own: slmops runs no code that comes with a model.",
            code="adapter-needs-code",
        )
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _named_code(config: dict[str, Untyped]) -> str | None:
    """Return the module that an adapter's configuration wants to have imported, unless it is transformers' own."""
    if config.get("megatron_config"):  # peft imports the module that stands beside it
        return f"megatron_core {config.get('megatron_core')!r}"
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if library is None or str(library).split(".")[0] == "transformers":
        return None
    return f"parent_library {library!r}"


def merge_adapter(call: MergeAdapter, progress: Progress) -> Merged:
    """Merge the adapter (safetensors only) into its base and write a checkpoint of the base's form and dtype.

    The tokenizer, `eval.jsonl` and `output_schema.json` are the adapter's if it has them, else the tokenizer is the
    base's. If the adapter carries embeddings of another vocabulary size, the base's are resized to it.

    Embedding and lm_head are untied where the adapter changes one of the two. The merged model is compared with
    base and adapter run unmerged.

    Raises `BadInput` if the adapter is pickled, is not a LoRA or does not fit the base, `StageFailed` if the merge is
    another model.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter_dir, base_dir, output_dir = call.adapter_dir, call.base_dir, call.output_dir
    read_adapter_config(adapter_dir)
    shapes = _adapter_shapes(adapter_dir)
    progress(0, 3, "loading the base")
    model = AutoModelForCausalLM.from_pretrained(
        base_dir, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    dtype = model.dtype
    # Merged in float32, because in bfloat16 the product of the two low-rank matrices would be rounded before the sum.
    model.to(torch.float32)
    rows = _embedding_rows(shapes)
    if rows is not None and rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if changes_one_of_two(adapter_dir, shapes):
        untie(model)

    progress(1, 3, "merging the adapter")
    try:
        adapted = PeftModel.from_pretrained(model, adapter_dir, local_files_only=True, use_safetensors=True).eval()
        missing = _unplaced(adapted, shapes)
        expected = _some_logits(adapted)
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise BadInput(
            f"The adapter {adapter_dir.name} does not fit the base {base_dir.name}: {_short(error)}",
            "Name the base that the adapter was trained on.",
            code="adapter-does-not-fit",
        ) from error
    if missing:
        raise BadInput(
            f"The adapter {adapter_dir.name} does not fit the base {base_dir.name}: "
            f"the base has no place for {len(missing)} of {len(shapes)} tensors, first {missing[0]}.",
            "Name the base that the adapter was trained on.",
            code="adapter-does-not-fit",
        )

    if (distance := float((_some_logits(merged) - expected).abs().max() / expected.std())) > LARGEST_DISTANCE:
        raise StageFailed(
            f"The adapter {adapter_dir.name} gives another model when it is merged: the logits differ by "
            f"{distance:.2g} of their standard deviation.",
            "Merge it in its training environment (merge_and_unload), and deploy the whole checkpoint.",
            code="merge-not-exact",
        )

    progress(2, 3, "saving the merged checkpoint")
    tokenizer_dir = tokenizer_folder(adapter_dir, base_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    if len(tokenizer) > merged.get_input_embeddings().num_embeddings:
        raise BadInput(
            f"The tokenizer of {tokenizer_dir.name} has {len(tokenizer)} tokens, the merged model only "
            f"{merged.get_input_embeddings().num_embeddings} embeddings.",
            "Save the adapter with its embeddings (peft: save_embedding_layers=True), or remove its tokenizer.",
            code="adapter-vocabulary",
        )
    output_dir.mkdir(parents=True)
    merged.to(dtype).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    for name in EVALUATION_FILES:
        if (adapter_dir / name).exists():
            shutil.copyfile(adapter_dir / name, output_dir / name)
    progress(3, 3, "merged")
    return Merged(
        parameters=merged.num_parameters(),
        dtype=str(dtype).removeprefix("torch."),
        merged_tensors=len(shapes),
        tokenizer_from="adapter" if tokenizer_dir == adapter_dir else "base",
    )


def tokenizer_folder(adapter_dir: Path, base_dir: Path) -> Path:
    """Return the folder with the merged model's tokenizer: the adapter's if it has one, else the base's."""
    return adapter_dir if any((adapter_dir / name).exists() for name in TOKENIZER_FILES) else base_dir


def changes_one_of_two(adapter_dir: Path, tensors: Iterable[str]) -> bool:
    """Whether the adapter changes only one of embedding and lm_head, which are separate before the merge.

    Complete embeddings that were saved because of new tokens serve both.
    """
    config = read_json(adapter_dir / ADAPTER_CONFIG)
    saved_whole = {str(name).rpartition(".")[2] for name in config.get("modules_to_save") or []}
    by_lora = {name for name in tensors if "lora_" in name and any(f".{layer}." in name for layer in VOCABULARY_LAYERS)}
    return bool(by_lora or saved_whole & set(VOCABULARY_LAYERS))


def untie(model: Untyped) -> None:
    """Give lm_head its own weights if it shares the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = type(head.weight)(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _some_logits(model: Untyped) -> Untyped:
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, rows, (1, COMPARED_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(input_ids=tokens).logits[0]


def _adapter_shapes(adapter_dir: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    path = adapter_dir / ADAPTER_WEIGHTS
    if not path.exists():
        pickles = sorted(each.name for each in adapter_dir.glob("adapter_model.*"))
        found = f"only {', '.join(pickles)}" if pickles else "none"
        raise BadInput(
            f"{adapter_dir} has no {ADAPTER_WEIGHTS}, found {found}.",
            "Save the adapter as safetensors (peft: safe_serialization=True); a pickle could run code.",
            code="adapter-without-weights",
        )
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BadInput(
            f"{path} is not a whole safetensors file: {error}.", "Copy it again.", code="weights-damaged"
        ) from None


def _embedding_rows(shapes: dict[str, list[int]]) -> int | None:
    """Return the vocabulary size of the adapter's complete embeddings, or None."""
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight").rpartition(".")[2]
        if layer in VOCABULARY_LAYERS and "lora_" not in name and len(shape) == 2:
            return shape[0]
    return None


def _unplaced(model: object, shapes: dict[str, list[int]]) -> list[str]:
    """Return the adapter's tensors that the model did not load: peft only warns of them."""
    from peft import get_peft_model_state_dict

    taken = get_peft_model_state_dict(model, save_embedding_layers=True)
    return sorted(set(shapes) - set(taken))


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]
