"""The Olive pass that builds an onnxruntime-genai model; only Olive's engine imports this module.

Olive 0.13's own `ModelBuilder` pass does not work with onnxruntime-genai 0.18 (it imports a module that is gone and
skips `check_extra_options`). This pass replaces it under the same name; `slmops.infra.olive.engine` configures Olive
accordingly.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.olive_pass import PassConfigParam
from olive.passes.pass_config import BasePassConfig

from slmops.infra.olive.embedding import lm_head_bits, replace_embedding
from slmops.infra.olive.options import BITS, BUILDER_OPTIONS, BUILDER_QUANTIZATION_OPTIONS
from slmops.infra.olive.streamed_quantization import streamed_quantization

MODEL_FILE = "model.onnx"
DEFAULT_BLOCK_SIZE = 32

# The builder's `cpu` target cannot run fp16 (its Cast nodes disagree on shapes). A model built for another target runs
# on the CPU once its provider options are gone; the fused Q/K norm of that target is an operator that the CPU does not
# have.
FP16_TARGET_ON_CPU = "webgpu"
FP16_OPTIONS_ON_CPU: dict[str, Any] = {"fuse_qk_norm_gqa": False}


# With a cache of the window's size, a model with sliding-window attention fails at run time on the CPU when a
# generation's max_length is below the window. The full cache gives the same results and has no such limit.
ROBUST_OPTIONS: dict[str, Any] = {"windowed_kv_cache": False}


class ModelBuilder(Pass):  # type: ignore[misc]
    """Build an onnxruntime-genai model (ONNX, genai_config.json, tokenizer) from a Hugging Face checkpoint."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            name: PassConfigParam(
                type_=option.type, required=name == "precision", default_value=None, description=option.description
            )
            for name, option in BUILDER_OPTIONS.items()
        }

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: AcceleratorSpec) -> bool:
        return False

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        options = {name: value for name, value in config.model_dump().items() if value is not None}
        folder = Path(output_model_path)
        folder.mkdir(parents=True, exist_ok=True)
        _create_model(Path(model.model_name_or_path), folder, options)
        _finish_genai_config(folder / "genai_config.json", options)
        _leave_code_out(folder)
        files = sorted(str(path) for path in folder.iterdir() if not path.name.startswith(MODEL_FILE))
        return ONNXModelHandler(folder, onnx_file_name=MODEL_FILE, model_attributes={"additional_files": files})


def _create_model(checkpoint: Path, folder: Path, options: dict[str, Any]) -> None:
    """Run onnxruntime-genai's builder."""
    from onnxruntime_genai.models import builder
    from transformers import AutoConfig

    precision, target = options["precision"], options.get("execution_provider", "cpu")
    config = AutoConfig.from_pretrained(checkpoint)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    # A pass before this one may have quantized the weights, each to its own width; the embedding it leaves as it was.
    is_quantized = hasattr(config, "quantization_config")
    extra_options = ROBUST_OPTIONS | {name: options[name] for name in BUILDER_QUANTIZATION_OPTIONS if name in options}
    if precision == "fp16" and target == "cpu":
        target = FP16_TARGET_ON_CPU
        extra_options |= FP16_OPTIONS_ON_CPU
    if precision in BITS and tied and (is_quantized or not _builder_can_share(options)):
        extra_options["shared_embeddings"] = False
    extra_options |= options.get("extra_options", {})
    # The builder removes its cache if it is empty, and fails if it does not exist.
    cache = folder / "builder-cache"
    arguments = (None, str(checkpoint), str(folder), precision, target, str(cache))
    builder.check_extra_options(*arguments, extra_options)
    _name_sliding_layers(extra_options["hf_details"]["hf_config"])
    builder.SmolLM3Model = _smollm3_with_layers_without_rope(builder.SmolLM3Model)

    def finish(model: Any) -> None:
        if options.get("quantize_embedding", True):
            block_size = options.get("block_size", DEFAULT_BLOCK_SIZE)
            bits = (is_quantized and lm_head_bits(model)) or BITS[precision]
            replace_embedding(model, bits=bits, block_size=block_size, tied=tied)

    with streamed_quantization(builder, finish):
        builder.create_model(*arguments, **extra_options)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(cache)


def _name_sliding_layers(config: Any) -> None:
    """Set `layer_types` for Mistral and Phi-3, which have only `sliding_window`: every layer uses sliding attention.

    The builder (0.18) takes layers without a type for full attention, and the model is wrong beyond the window.
    """
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def _smollm3_with_layers_without_rope(model_class: type) -> type:
    """Return the builder's SmolLM3, with correct layers without rotary embedding.

    The builder (0.18) only moves the rotation out of these layers' attention operator, and fails on the input that it
    has already removed; the checkpoint's layers have no rotation at all.
    """

    class SmolLM3Model(model_class):  # type: ignore[misc]
        def make_attention_qk_rope(self, layer_id: int, **kwargs: object) -> tuple[str, str]:
            if not self.no_rope_layers[layer_id]:
                return "", ""
            caches: tuple[str, str] = super().make_attention_qk_rope(layer_id, **kwargs)
            return caches

    return SmolLM3Model


def _builder_can_share(options: dict[str, Any]) -> bool:
    """Whether the builder's own sharing of a tied four-bit embedding gives a model that loads.

    It does not in QDQ form, nor with its default quantizer (it looks for names that do not exist) when the weights are
    asymmetric or lm_head has another width; the embedding is then quantized by `quantize_embedding`.
    """
    if options.get("use_qdq", False):
        return False
    asymmetric = not options.get("is_symmetric", True)
    mixed = "last_matmul" in options.get("extra_options", {}).get("matmul_mixed_precision", ())
    return not ((asymmetric or mixed) and options.get("algo_config", "default") == "default")


def _leave_code_out(folder: Path) -> None:
    """Remove the names of the checkpoint's classes from the copied files: no runtime may search for these classes."""
    for path in folder.glob("*config.json"):
        config = json.loads(path.read_text("utf-8"))
        if config.pop("auto_map", None) is not None:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _finish_genai_config(path: Path, options: dict[str, object]) -> None:
    genai_config = json.loads(path.read_text("utf-8"))
    if options.get("execution_provider", "cpu") == "cpu":
        genai_config["model"]["decoder"]["session_options"]["provider_options"] = []
    genai_config["search"] |= options.get("search", {})
    path.write_text(json.dumps(genai_config, indent=4) + "\n", "utf-8")
