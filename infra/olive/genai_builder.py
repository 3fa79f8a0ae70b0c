"""onnxruntime-genai's builder with corrections of its faults: it builds a model folder from a checkpoint."""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from slmops.infra.olive.embedding import lm_head_bits, replace_embedding
from slmops.infra.olive.mends import (
    gemma,
    layers_without_rope,
    lm_head,
    longrope,
    rope,
    sliding_layers,
    text_models,
    whole_weights,
)
from slmops.infra.olive.mends.patching import replaced
from slmops.infra.olive.options import BITS, BUILDER_QUANTIZATION_OPTIONS
from slmops.infra.olive.scales import store_scales_in_half
from slmops.infra.olive.streamed_quantization import streamed_quantization
from slmops.infra.records import Untyped

DEFAULT_BLOCK_SIZE = 32

# The builder's `cpu` target cannot run fp16 (its Cast nodes disagree on shapes). A model built for another target runs
# on the CPU once its provider options are gone; the fused Q/K norm of that target is an operator that the CPU does not
# have.
FP16_TARGET_ON_CPU = "webgpu"
FP16_OPTIONS_ON_CPU: dict[str, Untyped] = {"fuse_qk_norm_gqa": False}

# With a cache of the window's size, a model with sliding-window attention fails at run time on the CPU when a
# generation's max_length is below the window. The full cache gives the same results and has no such limit.
ROBUST_OPTIONS: dict[str, Untyped] = {"windowed_kv_cache": False}

# For the CPU, lm_head is computed for the last position of a prompt alone, from which a runtime samples. For all of
# them it takes a quarter of a prompt's time and, with a vocabulary of 150,000 tokens, 0.6 MB for each token. What
# compares distributions opens the same files with `slmops.infra.genai.logits_graph`.
SERVING_OPTIONS_ON_CPU: dict[str, Untyped] = {"prune_lm_head": True}

MENDS: tuple[Callable[[Untyped, Untyped], AbstractContextManager[None]], ...] = (
    sliding_layers.mended,
    layers_without_rope.mended,
    whole_weights.mended,
    gemma.mended,
    lm_head.mended,
    longrope.mended,
    rope.mended,
    text_models.mended,
)


def make_model(checkpoint: Path, folder: Path, options: dict[str, Untyped]) -> None:
    """Build a checkpoint into `folder` with these options of the pass (`slmops.infra.olive.options`)."""
    from onnxruntime_genai.models import builder
    from transformers import AutoConfig

    precision, target = options["precision"], options.get("execution_provider", "cpu")
    config = AutoConfig.from_pretrained(checkpoint)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    # A pass before this one may have quantized the weights, each to its own width; it does not change the embedding.
    is_quantized = hasattr(config, "quantization_config")
    extra_options = ROBUST_OPTIONS | {name: options[name] for name in BUILDER_QUANTIZATION_OPTIONS if name in options}
    if target == "cpu":
        extra_options |= SERVING_OPTIONS_ON_CPU
    if precision == "fp16" and target == "cpu":
        target = FP16_TARGET_ON_CPU
        extra_options |= FP16_OPTIONS_ON_CPU
    if precision in BITS and tied and (is_quantized or not _builder_can_share(options)):
        extra_options["shared_embeddings"] = False
    extra_options |= options.get("extra_options", {})
    # The builder removes its cache if it is empty, and fails if it does not exist.
    cache = folder / "builder-cache"
    arguments = (None, str(checkpoint), str(folder), precision, target, str(cache))

    def finish(model: Untyped) -> None:
        if options.get("quantize_embedding", True):
            block_size = options.get("block_size", DEFAULT_BLOCK_SIZE)
            bits = (is_quantized and lm_head_bits(model)) or BITS[precision]
            replace_embedding(model, bits=bits, block_size=block_size, tied=tied)
        if target == "cpu":
            store_scales_in_half(model)

    with ExitStack() as stack:
        stack.enter_context(_tokenizer_read_once())
        builder.check_extra_options(*arguments, extra_options)
        for mended in MENDS:
            stack.enter_context(mended(builder, extra_options["hf_details"]["hf_config"]))
        stack.enter_context(streamed_quantization(builder, finish))
        builder.create_model(*arguments, **extra_options)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(cache)
    _finish_genai_config(folder / "genai_config.json", options)
    _leave_code_out(folder)


@contextmanager
def _tokenizer_read_once() -> Iterator[None]:
    """Give the builder the tokenizer that it has read already: it reads it three times, of 200,000 tokens for 1.5 s."""
    from transformers import AutoTokenizer

    with replaced(AutoTokenizer, "from_pretrained", functools.cache(AutoTokenizer.from_pretrained)):
        yield


def _builder_can_share(options: dict[str, Untyped]) -> bool:
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
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8", newline="\n")


def _finish_genai_config(path: Path, options: dict[str, Untyped]) -> None:
    genai_config = json.loads(path.read_text("utf-8"))
    if options.get("execution_provider", "cpu") == "cpu":
        genai_config["model"]["decoder"]["session_options"]["provider_options"] = []
    genai_config["search"] |= options.get("search", {})
    path.write_text(json.dumps(genai_config, indent=4) + "\n", "utf-8", newline="\n")
