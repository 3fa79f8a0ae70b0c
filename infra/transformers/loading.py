"""Load a checkpoint into transformers, offline and without its code."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slmops.infra.checkpoints.folder import read_tensor_headers
from slmops.infra.errors import StageFailed, reason_of
from slmops.infra.transformers.tokenizer import load_tokenizer

WIDENED_ELEMENTS = 2**21  # at once: 8 MB in float32, so that they are still in the processor's cache when they are used
STORED_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def load_checkpoint(checkpoint_dir: Path, dtype: str) -> tuple[Any, Any]:
    """Return a checkpoint's tokenizer and its model, with all weights in `dtype`; no code of the checkpoint is run.

    `dtype` is a name of torch's. Raises `StageFailed` when transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(checkpoint_dir)
    with _told_of(checkpoint_dir):
        model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=dtype, use_safetensors=True, **OFFLINE)
    return tokenizer, model.eval()


def load_to_answer(checkpoint_dir: Path) -> tuple[Any, Any]:
    """Return a checkpoint's tokenizer and its model, which computes in float32.

    Matrices that are stored in 16 bits stay in them, and each is widened when it is used. The results are those of
    weights in float32, but for the order of some sums; the memory is half, and a step that reads all weights for a few
    rows is no slower. Raises as `load_checkpoint` does.
    """
    tokenizer = load_tokenizer(checkpoint_dir)
    with _told_of(checkpoint_dir):
        return tokenizer, _load_as_stored(checkpoint_dir).eval()


@contextmanager
def _told_of(checkpoint_dir: Path) -> Iterator[None]:
    """Raise transformers' errors as `StageFailed`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise StageFailed(
            f"transformers cannot load the checkpoint {checkpoint_dir}: {reason_of(error, -1)}.",
            "Load it with AutoModelForCausalLM.from_pretrained and correct the reported fault.",
            code="checkpoint-does-not-load",
        ) from error


def _dtype_of_matrices(checkpoint_dir: Path) -> str:
    """Return the type in which a checkpoint's matrices are held: their own, if all have the same of 16 bits."""
    stored = {header.dtype for header in read_tensor_headers(checkpoint_dir).values() if len(header.shape) > 1}
    return STORED_DTYPES.get(stored.pop(), "float32") if len(stored) == 1 else "float32"


def _load_as_stored(checkpoint_dir: Path) -> Any:
    """Load a checkpoint in float32, but for the matrices of its linear layers and embeddings, of 16 bits if stored so.

    transformers has a plan of the types of single weights, for those that a model always has in float32. Here the plan
    names the matrices.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint_dir, **OFFLINE)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    names = _names_of_matrices(skeleton)
    stored = getattr(torch, _dtype_of_matrices(checkpoint_dir))
    plan = {f"^{re.escape(name)}[.]weight$": stored for name in names}
    changes = {"_get_dtype_plan": lambda self, dtype: plan, "dtype": torch.float32}
    model_class: Any = type(type(skeleton).__name__, (type(skeleton),), changes)
    model = model_class.from_pretrained(checkpoint_dir, dtype=torch.float32, use_safetensors=True, **OFFLINE)
    for name in names:
        module = model.get_submodule(name)
        module.forward = (
            _widening_linear(module) if isinstance(module, torch.nn.Linear) else _widening_embedding(module)
        )
    return model


def _names_of_matrices(model: Any) -> list[str]:
    """Return the linear layers and embeddings whose weight no module of another kind uses."""
    from torch.nn import Embedding, Linear

    known, other = dict[str, int](), set[int]()
    for name, module in model.named_modules():
        is_known = type(module).forward in (Linear.forward, Embedding.forward) or _is_scaled_embedding(module)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if is_known and parameter_name == "weight":
                known[name] = id(parameter)
            else:
                other.add(id(parameter))
    return [name for name, weight in known.items() if weight not in other]


def _is_scaled_embedding(module: Any) -> bool:
    """Whether a module is what transformers calls a ScaledWordEmbedding: its rows are multiplied by a number."""
    from torch.nn import Embedding

    return isinstance(module, Embedding) and hasattr(module, "embed_scale")


def _widening_linear(layer: Any) -> Any:
    """Return the forward of a linear layer with a matrix of 16 bits, for inputs in float32."""
    import torch
    from torch.nn.functional import linear

    rows = max(1, WIDENED_ELEMENTS // layer.in_features)

    def forward(inputs: Any) -> Any:
        outputs = torch.cat([linear(inputs, part.float()) for part in layer.weight.split(rows)], dim=-1)
        return outputs if layer.bias is None else outputs + layer.bias

    return forward


def _widening_embedding(embedding: Any) -> Any:
    """Return the forward of an embedding of 16 bits, whose rows are in float32."""
    from torch.nn.functional import embedding as rows_of

    scale = getattr(embedding, "embed_scale", 1.0)
    return lambda ids: rows_of(ids, embedding.weight).float() * scale
