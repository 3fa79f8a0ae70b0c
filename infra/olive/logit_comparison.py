"""The logits of transformers and of onnxruntime-genai for the same tokens: as a prompt, and token by token."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slmops.infra.genai.runtime import open_model
from slmops.infra.olive.mends.text_models import context_length
from slmops.infra.records import Untyped

TOKENS = (40, 400)  # lengths of the prompts for every model
TOKENS_BEYOND = 24  # tokens of a prompt after the end of a window or of the original length
STEPS = 4  # generated tokens before such an end, and as many after it
LARGEST_WORK = 3e12  # limit on the floating-point operations of a prompt: some 30 s on two cores
LARGEST_SCORES_BYTES = 2_300_000_000  # limit on the attention scores of one layer, which the runtimes keep in memory

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Trial:
    """Tokens, transformers' logits at each of their positions, and the position from which generation is compared.

    `generated` are the logits of its steps. With a rotary embedding that depends on the whole length (longrope), they
    differ from those of the prompt.
    """

    tokens: tuple[int, ...]
    expected: Logits
    start: int
    generated: Logits


@dataclass(frozen=True)
class Difference:
    """The largest distance of two logits at a position, over the standard deviation of the expected ones."""

    tokens: int
    position: int
    distance: float
    generating: bool


def reference_trials(folder: Path, parameters: int) -> list[Trial]:
    """Return a trial of each feasible length with the checkpoint in `folder`, which is loaded in float32.

    Raises what transformers raises, and `ValueError` for weights that are missing or give no finite logits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model, loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    if loaded["missing_keys"]:
        raise ValueError(f"the weights lack {sorted(loaded['missing_keys'])[0]}")
    model.eval()
    ends = [*(length - TOKENS_BEYOND for length in TOKENS), *_ends(model.config)]
    room = context_length(model.config) - TOKENS_BEYOND
    trials = [
        _trial(model, end)
        for end in sorted(set(ends))
        if end == min(ends) or (end <= room and _is_affordable(model.config, parameters, end))
    ]
    del model
    gc.collect()
    return trials


def _ends(config: Untyped) -> list[int]:
    """Return the positions at which a model's computation changes: the end of its window and its original length."""
    rope = getattr(config, "rope_parameters", None) or {}
    sections = [rope, *(section for section in rope.values() if isinstance(section, dict))]
    ends = {section.get("original_max_position_embeddings") for section in sections}
    ends |= {getattr(config, name, None) for name in ("sliding_window", "original_max_position_embeddings")}
    return [end for end in ends if isinstance(end, int) and end > STEPS]


def _is_affordable(config: Untyped, parameters: int, end: int) -> bool:
    tokens, heads = end + TOKENS_BEYOND, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    work = 2 * parameters * tokens + 4 * config.num_hidden_layers * heads * head_dim * tokens**2
    return bool(work <= LARGEST_WORK and 4 * heads * tokens**2 <= LARGEST_SCORES_BYTES)


def _trial(model: Untyped, end: int) -> Trial:
    length = end + TOKENS_BEYOND
    generator = np.random.default_rng(length)
    tokens = tuple(int(token) for token in generator.integers(0, model.config.vocab_size - 1, length))
    expected = _logits(model, tokens)
    start = end - STEPS
    before = _logits(model, tokens[:end])
    generated = np.concatenate([before[start:], expected[end : end + STEPS]])
    if not np.allclose(before, expected[:end], atol=1e-2 * float(expected.std())):
        generated = before[start:]  # the runtime has one wrong step at a change of rotation, which is reported
    return Trial(tokens, expected, start, generated)


def _logits(model: Untyped, tokens: Sequence[int]) -> Logits:
    import torch

    with torch.inference_mode():
        logits: Logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
    if not np.isfinite(logits).all():
        raise ValueError("its weights give logits that are not finite")
    return logits


def differences(folder: Path, trials: Sequence[Trial], threads: int) -> Iterator[Difference]:
    """Yield the distances of a built model's logits from the expected ones, at each position and step of the trials."""
    import onnxruntime_genai as og

    model = open_model(folder, threads, all_positions=True)

    def start(tokens: Sequence[int]) -> Untyped:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(tokens) + 1, do_sample=False, random_seed=0)
        return og.Generator(model, params)

    for trial in trials:
        count, spread = len(trial.tokens), float(trial.expected.std()) or 1.0
        generator = start(trial.tokens)
        generator.append_tokens(np.array([trial.tokens], np.int32))
        distances = np.abs(generator.get_output("logits")[0] - trial.expected).max(-1) / spread
        for position, distance in enumerate(distances):
            yield Difference(count, position, float(distance), False)
        del generator
        generator = start(trial.tokens)
        generator.append_tokens(np.array([trial.tokens[: trial.start + 1]], np.int32))
        for step, expected in enumerate(trial.generated):
            position = trial.start + step
            found = generator.get_logits().reshape(-1)
            yield Difference(count, position, float(np.abs(found - expected).max()) / spread, True)
            _generate(generator, trial.tokens[position + 1], len(found))
        del generator


def _generate(generator: Untyped, token: int, vocabulary_size: int) -> None:
    """Let the runtime generate this token like its own: its computation may change there."""
    forced = np.full((1, 1, vocabulary_size), -1e9, np.float32)
    forced[..., token] = 0
    generator.set_logits(forced)
    generator.generate_next_token()
