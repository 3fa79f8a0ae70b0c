"""Measure the distributions of broken and of rounded models, from which `BROKEN_LIMITS` of the gate come.

Run as `python -m tests.benchmarks.gate_limits CHECKPOINT [--recipes fp16 int8 int4-rtn] [--rows 24]` on a checkpoint
with trained weights of a Llama-like architecture. Sound variants are built by slmops' own recipes and answer in
onnxruntime-genai. Broken ones are the checkpoint with one fault that a build or a conversion can make, in torch: the
faults are of the weights, so that the runtime does not matter. All are compared with the checkpoint at the same
positions of its own answers to the built-in chats. Prints a Markdown table; takes about eight minutes on two idle cores
for 135 M parameters.
"""

import argparse
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmops.infra.genai.calls import Evaluate
from slmops.infra.genai.evaluation import evaluate
from slmops.infra.reference.answers import ANSWERS_FILE, LOGITS_FILE, Question, SourceAnswers
from slmops.infra.reference.distributions import compare_position
from slmops.infra.settings import GateSettings
from slmops.infra.transformers.answers import answer
from slmops.infra.transformers.calls import AnswerAsSource
from slmops.infra.transformers.loading import load_checkpoint
from slmops.tasks.build.recipes import load_recipe
from slmops.tasks.questions.evaluation_set import chat_prompts
from slmops.tasks.verdict.thresholds import thresholds_for
from tests.benchmarks.builds import build

Fault = Callable[[Any], None]


@dataclass(frozen=True)
class Distance:
    """How far a variant's distributions are from the checkpoint's: mean KL divergence in nats, and top-1 agreement.

    `near_agreement` counts near ties as agreement.
    """

    variant: str
    sound: bool
    precision: str
    kl_divergence: float
    top1_agreement: float
    near_agreement: float

    def passes(self, *, score_decides: bool) -> bool:
        """Whether they pass the gate's default limits of the precision."""
        limits = thresholds_for(self.precision, GateSettings())
        limits = limits.where_the_score_decides if score_decides else limits
        return self.kl_divergence <= limits.max_kl_divergence and self.near_agreement >= limits.min_top1_agreement


def faults(layers: int) -> dict[str, Fault]:
    """Return faults by name, of a model of so many layers."""
    middle = layers // 2
    return {
        "first layer's down projection zero": lambda model: _of(model, 0, "mlp.down_proj").zero_(),
        "one layer left out": lambda model: _leave_out(model, middle),
        "four layers left out": lambda model: [_leave_out(model, middle + offset) for offset in range(4)],
        "two layers swapped": lambda model: _swap(model, middle, middle + 4),
        "a head dimension's halves interleaved in q and k": _interleave,
        "rotary base a tenth": lambda model: _set_rotary_base(model, 0.1),
        "key and value heads in another order": _reverse_value_heads,
        "norms' weights all one": _reset_norms,
        "tokens shifted by one": lambda model: model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0)),
        "three bits, rounded": lambda model: _round(model, 3),
        "two bits, rounded": lambda model: _round(model, 2),
        "scales of one layer doubled": lambda model: _double(model, middle),
        "scales of a quarter of the layers doubled": lambda model: [
            _double(model, layer) for layer in range(0, layers, 4)
        ],
    }


def _of(model: Any, layer: int, name: str) -> Any:
    return model.get_submodule(f"model.layers.{layer}.{name}").weight


def _matrices(model: Any) -> Iterator[Any]:
    return (weight for name, weight in model.named_parameters() if ".layers." in name and weight.dim() == 2)


def _leave_out(model: Any, layer: int) -> None:
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        _of(model, layer, name).zero_()


def _swap(model: Any, one: int, other: int) -> None:
    first, second = model.model.layers[one].state_dict(), model.model.layers[other].state_dict()
    kept = {name: tensor.clone() for name, tensor in first.items()}
    model.model.layers[one].load_state_dict(second)
    model.model.layers[other].load_state_dict(kept)


def _interleave(model: Any) -> None:
    """Order q and k as in a GGUF file, without the matching permutation."""
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            rows, columns = projection.weight.shape
            size = layer.self_attn.head_dim
            halves = projection.weight.view(rows // size, 2, size // 2, columns)
            projection.weight.copy_(halves.transpose(1, 2).reshape(rows, columns))


def _set_rotary_base(model: Any, factor: float) -> None:
    size = model.model.rotary_emb.inv_freq.numel()
    exponents = model.model.rotary_emb.inv_freq.new_tensor([index / size for index in range(size)])
    model.model.rotary_emb.inv_freq.mul_(factor**-exponents)


def _reverse_value_heads(model: Any) -> None:
    for layer in model.model.layers:
        weight, size = layer.self_attn.v_proj.weight, layer.self_attn.head_dim
        weight.copy_(weight.view(-1, size, weight.shape[1]).flip(0).reshape(weight.shape))


def _reset_norms(model: Any) -> None:
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and "norm" in name:
            weight.fill_(1.0)


def _round(model: Any, bits: int, block: int = 32) -> None:
    """Round every matrix to `bits`, symmetrically in blocks of a row."""
    largest = 2 ** (bits - 1) - 1
    for weight in _matrices(model):
        blocks = weight.view(-1, block)
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12) / max(largest, 1)
        weight.copy_(((blocks / scale).round().clamp(-largest - 1, largest) * scale).view_as(weight))


def _double(model: Any, layer: int) -> None:
    _of(model, layer, "mlp.down_proj").mul_(2)


def broken_variants(checkpoint: Path, reference: Path, names: list[str]) -> Iterator[Distance]:
    """Yield the distances of the checkpoint with each fault whose name contains one of `names`."""
    import torch

    model = load_checkpoint(checkpoint, "float32")[1]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # a fault of it is none of the embedding
    answers = SourceAnswers.model_validate_json((reference / ANSWERS_FILE).read_bytes())
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frequencies = model.model.rotary_emb.inv_freq.clone()
    for name, fault in faults(len(model.model.layers)).items():
        if not any(part in name for part in names):
            continue
        with torch.no_grad():
            fault(model)
        yield _distance(model, answers, reference, name)
        model.load_state_dict(whole)
        model.model.rotary_emb.inv_freq.copy_(frequencies)


def _distance(model: Any, answers: SourceAnswers, reference: Path, name: str) -> Distance:
    import torch

    expected = iter(np.load(reference / LOGITS_FILE, mmap_mode="r"))
    compared = []
    for row in answers.rows:
        ids = row.prompt_ids + row.answer_ids
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False)
        logits = output.logits[0].numpy()
        compared += [compare_position(next(expected), logits[at], ids[at + 1]) for at in row.positions]
    divergences = [position.kl_divergence if position.kl_divergence is not None else math.inf for position in compared]
    agreeing = sum(position.agrees for position in compared) / len(compared)
    nearly = sum(position.nearly_agrees for position in compared) / len(compared)
    return Distance(name, False, "int4", sum(divergences) / len(compared), agreeing, nearly)


def sound_variants(
    checkpoint: Path,
    names: list[str],
    work: Path,
    questions: tuple[Question, ...],
    sizes: dict[str, int],
    reference: Path,
) -> Iterator[Distance]:
    """Yield the distances of the recipes' builds."""
    for name in names:
        recipe, folder = load_recipe(name), work / name
        build(recipe, checkpoint, folder, sizes["threads"])
        found = evaluate(
            Evaluate(model_dir=folder / "model", rows=questions, reference_dir=reference, **sizes), _silent
        )
        assert found.kl_divergence is not None
        assert found.top1_agreement is not None
        assert found.near_agreement is not None
        yield Distance(name, True, recipe.precision, found.kl_divergence, found.top1_agreement, found.near_agreement)
        shutil.rmtree(folder)


def _silent(done: float, total: float, what: str) -> None:
    pass


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["fp16", "int8", "int4-rtn"], help="None: no recipe.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--faults", nargs="*", default=[""], help="Parts of their names; default: all. None: no fault.")
    arguments = parser.parse_args()
    rows = chat_prompts()[: arguments.rows]
    questions = tuple(Question(id=row.id, messages=[message.model_dump() for message in row.messages]) for row in rows)
    sizes = {
        "max_new_tokens": arguments.new_tokens,
        "max_positions": arguments.positions,
        "threads": arguments.threads,
    }
    with tempfile.TemporaryDirectory() as name:
        work, checkpoint = Path(name), arguments.checkpoint.absolute()
        reference = work / "reference"
        answer(
            AnswerAsSource(checkpoint_dir=checkpoint, rows=questions, batch_size=8, output_dir=reference, **sizes),
            _silent,
        )
        print(
            "| variant | KL, nats | top-1 | with near ties | passes alone | passes beside a score |\n"
            "|---|---|---|---|---|---|",
            flush=True,
        )
        sound = sound_variants(checkpoint, arguments.recipes, work, questions, sizes, reference)
        broken = broken_variants(checkpoint, reference, arguments.faults)
        for distances in (sound, broken):
            for found in distances:
                kind = "recipe" if found.sound else "fault"
                verdicts = ["yes" if found.passes(score_decides=decides) else "no" for decides in (False, True)]
                print(
                    f"| {kind}: {found.variant} | {found.kl_divergence:.4f} | {found.top1_agreement:.3f} "
                    f"| {found.near_agreement:.3f} | {verdicts[0]} | {verdicts[1]} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
