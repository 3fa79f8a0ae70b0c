"""slmops's versions of Olive's passes `Gptq` and `Rtn`; only Olive's engine imports this module.

Olive 0.13's `Gptq` sums the products of inputs again for each matrix that reads them, gives every layer the attention
mask of the first one, and rounds in the checkpoint's dtype, which loses eight bits. Here the result has the same
format, and all its files except the weights are copies of the checkpoint's files.
"""

import fnmatch
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from olive.common.hf.wrapper import ModelWrapper
from olive.common.quant.hf_utils import OliveHfQuantizationConfig
from olive.common.quant.nn import QuantLinear
from olive.model import HfModelHandler
from olive.passes.pass_config import BasePassConfig
from olive.passes.pytorch import gptq, quant_utils, rtn, train_utils
from torch import Tensor
from torch.nn import Module

from slmops.infra.olive.gptq_rounding import Rounded, round_for_inputs, round_to_nearest
from slmops.infra.olive.memory import release_mapped_pages
from slmops.infra.olive.step_progress import report_step
from slmops.infra.transformers.lanes import in_threads

T = TypeVar("T")
R = TypeVar("R")

CALIBRATED_BITS = 4  # eight bits are rounded to nearest, because their error is far below that of four
CONFIG_FILE = "config.json"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")


class Gptq(gptq.Gptq):  # type: ignore[misc]
    """GPTQ of a Hugging Face checkpoint, layer by layer; keys of `overrides` may be patterns (`*.down_proj`)."""

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        with torch.no_grad():
            wrapper, quantization, _ = quant_utils.prepare_model(model, _with_module_names(model, config))
            samples = train_utils.get_calibration_dataset(model, config.data_config)
            _quantize_layers(wrapper, [sample["input_ids"] for sample in samples], config.damp_percent)
            return _finished(model, wrapper, quantization, output_model_path)


class Rtn(rtn.Rtn):  # type: ignore[misc]
    """Round to nearest, without the embedding, because the builder does not read a quantized one."""

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        config = _with_module_names(model, config).model_copy(update={"embeds": False})
        with torch.no_grad():
            wrapper, quantization, _ = quant_utils.prepare_model(model, config, allow_quantized=True)
            return _finished(model, wrapper, quantization, output_model_path)


def _with_module_names(model: HfModelHandler, config: BasePassConfig) -> BasePassConfig:
    """Return a pass's configuration with the names of the modules that its overrides' patterns match."""
    from transformers import AutoConfig, AutoModelForCausalLM

    patterns = config.overrides or {}
    if not any("*" in pattern for pattern in patterns):
        return config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.model_name_or_path))
    names = [name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)]
    named = {
        name: override for pattern, override in patterns.items() for name in names if fnmatch.fnmatchcase(name, pattern)
    }
    return config.model_copy(update={"overrides": named})


def _quantize_layers(wrapper: ModelWrapper, rows: Sequence[Tensor], damping: float) -> None:
    """Quantize a prepared model in place; each layer is calibrated on the outputs of the quantized layers before it."""
    layers = wrapper.get_layers(return_name=False)
    inputs, arguments = _layer_inputs(wrapper, rows)
    for number, layer in enumerate(layers):
        report_step(number / len(layers), f"calibrating layer {number + 1} of {len(layers)}")
        layer.float()
        groups = _side_by_side(
            lambda group: _rounded_together(group, damping), _readers(layer, inputs, arguments[number])
        )
        rounded = {module: part for group in groups for module, part in group}
        for module in _prepared(layer):
            if module not in rounded:
                rounded[module] = round_to_nearest(module.weight.data, module.quant_info.quantizer)
            module.weight.data = rounded[module].restored()
        inputs = _run(layer, inputs, arguments[number])
        _pack(layer, rounded)
        release_mapped_pages()
    norm = wrapper.get_pre_head_layernorm(return_name=False).float()
    head = wrapper.get_lm_head(return_name=False)
    if _is_calibrated(head):
        readers = _Readers([head.float()], [norm(hidden_states) for hidden_states in inputs])
        _pack(wrapper.model, dict(_rounded_together(readers, damping)))


Arguments = tuple[tuple[object, ...], dict[str, object]]


def _layer_inputs(wrapper: ModelWrapper, rows: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Arguments]]]:
    """Return the inputs of the first layer for each row, in fp32, and every layer's other arguments, row by row."""
    layers = wrapper.get_layers(return_name=False)
    arguments: list[list[Arguments]] = [[] for _ in layers]

    def recording(number: int) -> Callable[..., Tensor]:
        def record(hidden_states: Tensor, *positional: object, **named: object) -> Tensor:
            arguments[number].append((positional, named))
            return hidden_states

        return record

    for number, layer in enumerate(layers):
        layer.forward = recording(number)
    try:
        embed = wrapper.model.get_input_embeddings()
        inputs = [embed(row.reshape(1, -1)).float() for row in rows]
        for embedded in inputs:
            wrapper.model.get_decoder()(inputs_embeds=embedded, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return inputs, arguments


def _run(layer: Module, inputs: Sequence[Tensor], arguments: Sequence[Arguments]) -> list[Tensor]:
    def run(number: int) -> Tensor:
        positional, named = arguments[number]
        output: Tensor | tuple[Tensor, ...] = layer(inputs[number], *positional, **named)
        return output[0] if isinstance(output, tuple) else output

    return _side_by_side(run, range(len(inputs)))


def _side_by_side(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Do a work for each item, without gradients, in as many threads as torch has, each of which computes alone.

    The matrices of one text are too small for several threads, which would wait for each other.
    """
    without_gradients = torch.no_grad()(work)  # a context would hold for this thread only
    return [*in_threads(torch.get_num_threads(), without_gradients, items)]


@dataclass(frozen=True)
class _Readers:
    """Matrices that read the same inputs, and these inputs, [..., inputs] of each text."""

    modules: list[Module]
    inputs: list[Tensor]

    def products(self) -> Tensor:
        """Return the sum of the inputs' products, [inputs, inputs]."""
        size = self.inputs[0].shape[-1]
        products = torch.zeros(size, size)
        for given in self.inputs:
            rows = given.reshape(-1, size)
            products.addmm_(rows.T, rows)
        return products


def _readers(layer: Module, inputs: Sequence[Tensor], arguments: Sequence[Arguments]) -> list[_Readers]:
    """Run a layer, and return those of its matrices that are to be calibrated, with what they read."""
    text = threading.local()

    def see(module: Module, positional: tuple[Tensor, ...]) -> None:
        text.seen.append((module, positional[0]))

    def seen(number: int) -> list[tuple[Module, Tensor]]:
        text.seen = []
        positional, named = arguments[number]
        layer(inputs[number], *positional, **named)
        return list(text.seen)

    hooks = [module.register_forward_pre_hook(see) for module in _prepared(layer) if _is_calibrated(module)]
    try:
        texts = _side_by_side(seen, range(len(inputs)))
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[Module, _Readers] = {}
    for of_text in texts:
        last: tuple[Module, Tensor] | None = None  # the last input, and the matrix that was the first to read it
        for module, given in of_text:
            if last and given is last[1]:
                if module not in found:
                    found[module] = found[last[0]]
                    found[module].modules.append(module)
                continue
            last = module, given
            found.setdefault(module, _Readers([module], [])).inputs.append(given)
    return [*{id(readers): readers for readers in found.values()}.values()]


def _rounded_together(readers: _Readers, damping: float) -> list[tuple[Module, Rounded]]:
    """Return each matrix and its rounding; matrices of the same format are rounded as one matrix of all rows."""
    of_format: dict[tuple[int, int, bool], list[Module]] = {}
    for module in readers.modules:
        quantizer = module.quant_info.quantizer
        of_format.setdefault((quantizer.bits, quantizer.group_size, quantizer.symmetric), []).append(module)
    products = readers.products()
    readers.inputs.clear()
    found: list[tuple[Module, Rounded]] = []
    for modules in of_format.values():
        weight = torch.cat([module.weight.data for module in modules])
        rounded = round_for_inputs(weight, products.clone(), modules[0].quant_info.quantizer, damping)
        found += zip(modules, rounded.parts([module.out_features for module in modules]), strict=True)
    return found


def _prepared(module: Module) -> list[Module]:
    return [child for child in module.modules() if hasattr(child, "quant_info")]


def _is_calibrated(module: Module) -> bool:
    return hasattr(module, "quant_info") and module.quant_info.quantizer.bits <= CALIBRATED_BITS


def _pack(model: Module, rounded: dict[Module, Rounded]) -> None:
    """Replace prepared matrices by packed ones; matrices that are not rounded yet are rounded to nearest."""

    def packed(module: Module, _: str) -> QuantLinear:
        quantizer = module.quant_info.quantizer
        found = rounded.get(module) or round_to_nearest(module.weight.data, quantizer)
        matrix = QuantLinear.from_tensors(
            weight=found.values,
            bits=quantizer.bits,
            symmetric=quantizer.symmetric,
            group_size=quantizer.group_size,
            scales=found.scales,
            zero_points=found.zero_points,
            quantized=True,
            in_features=module.in_features,
            out_features=module.out_features,
            bias=module.bias is not None,
        )
        if module.bias is not None:
            matrix.bias = module.bias.data.float()
        return matrix

    quant_utils.replace_matching_submodules(model, lambda module, _: hasattr(module, "quant_info"), packed)


def _finished(
    model: HfModelHandler, wrapper: ModelWrapper, quantization: OliveHfQuantizationConfig, output_model_path: str
) -> HfModelHandler:
    """Write a model; all files except weights are the given ones, with the quantization in config.json."""
    _pack(wrapper.model, {})
    result = quant_utils.finalize(model, output_model_path, wrapper, quantization, "cpu")
    source, target = Path(model.model_name_or_path), Path(output_model_path)
    written = json.loads((target / CONFIG_FILE).read_text("utf-8"))
    config = json.loads((source / CONFIG_FILE).read_text("utf-8"))
    config["quantization_config"] = written["quantization_config"]
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, target / path.name)
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2), "utf-8", newline="\n")
    return result
