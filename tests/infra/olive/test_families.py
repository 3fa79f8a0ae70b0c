"""The proof of each family: checkpoints in the shapes of the Hub's configs, built in fp32 and compared position by
position; and every mend of the builder, which must go when the builder needs it no more."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from slmops.infra.errors import BadInput
from slmops.infra.olive import family_proof, genai_builder
from slmops.infra.olive.calls import FamilyProof, ProveFamily
from slmops.infra.olive.cut_checkpoint import cut_checkpoint
from slmops.infra.olive.logit_comparison import differences, reference_trials
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
from slmops.infra.process.channel import QUIET_ENVIRONMENT
from tests.support.errors import coded
from tests.support.family_checkpoints import LARGE, TOKENIZER_OF
from tests.support.family_configs import REAL, make_family, small_config
from tests.support.genai_models import logits_of
from tests.support.real_models import real_model


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (QUIET_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        yield


def prove(checkpoint: Path) -> FamilyProof:
    work = checkpoint.parent / f"{checkpoint.name}-work"
    work.mkdir(exist_ok=True)
    call = ProveFamily(checkpoint_dir=checkpoint, kept_dir=work / "kept", work_dir=work, threads=1)
    return call.perform(lambda done, total, what: None)


SOUND = 2e-5  # of tiny widths; faults that the tolerance would let pass are mended too
LENGTHS = {
    "google/gemma-3-270m-it": (40, 72, 400),
    "microsoft/Phi-3.5-mini-instruct": (40, 400, 4120),
    "microsoft/Phi-4-mini-instruct": (40, 400, 4120),
    "openai/gpt-oss-20b": (40, 72, 280, 400),
    "meta-llama/Llama-3.2-1B-Instruct": (40, 400, 8216),
}


@pytest.mark.parametrize("model", REAL)
def test_it_is_exact_at_every_position(model: str, tmp_path: Path) -> None:
    proof = prove(make_family(tmp_path / "checkpoint", small_config(model)))
    assert proof.first_difference is None
    assert proof.distance < SOUND
    assert set(LENGTHS.get(model, (40, 400))) <= set(proof.lengths)


DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_each_row_of_the_table_tells_how_its_configurations_are_proven() -> None:
    lines = (DOCS / "families.md").read_text("utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| family |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table if line.startswith("| ")]
    told = {model: tokenizer for _, models, tokenizer in rows[1:] for model in re.findall(r"`([^`]+)`", models)}
    assert all(models.startswith("`") for _, models, _ in rows[1:])
    assert {*told} == {*REAL}
    families = {model: TOKENIZER_OF.get(model, "") for model in REAL}
    assert {model for model in told if told[model].startswith("real")} == {*TOKENIZER_OF}
    assert {model for model in told if "[c]" in told[model]} == {model for model in REAL if families[model] in LARGE}


def changed(model: str, **changes: Any) -> dict[str, Any]:
    return {**small_config(model), **changes}


GEMMA = "google/gemma-3-270m-it"
PHI = "microsoft/Phi-3.5-mini-instruct"
LLAMA = "HuggingFaceTB/SmolLM2-135M-Instruct"
QWEN = "Qwen/Qwen2.5-0.5B-Instruct"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}

FURTHER = {
    "Qwen2 with yarn": changed(QWEN, rope_scaling=YARN),
    "Llama with yarn": changed(LLAMA, rope_scaling=YARN),
    "Llama with a linear rope": changed(LLAMA, rope_scaling={"type": "linear", "factor": 4.0}),
    "Qwen2 with a linear rope": changed(QWEN, rope_scaling={"type": "linear", "factor": 4.0}),
    "Llama with biases": changed(LLAMA, attention_bias=True, mlp_bias=True),
    "longrope without the older key": changed(PHI, rope_scaling={"rope_type": "longrope", **FACTORS}),
    "Qwen2 with a window in some layers": changed(
        QWEN, use_sliding_window=True, sliding_window=48, max_window_layers=1
    ),
    "Gemma with a width that is no square": changed("google/gemma-2-2b-it", hidden_size=96),
}


@pytest.mark.parametrize("case", FURTHER)
def test_a_variation_is_exact_too(case: str, tmp_path: Path) -> None:
    proof = prove(make_family(tmp_path / "checkpoint", FURTHER[case]))
    assert proof.distance < SOUND


MENDED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sliding_layers": (sliding_layers.mended, changed("mistralai/Mistral-7B-v0.1")),
    "layers_without_rope": (layers_without_rope.mended, changed("HuggingFaceTB/SmolLM3-3B")),
    "whole_weights, a norm's epsilon": (whole_weights.mended, changed("nvidia/Nemotron-Mini-4B-Instruct")),
    "whole_weights, a norm's weight": (whole_weights.mended, changed("google/gemma-2-2b-it")),
    "whole_weights, a decay": (whole_weights.mended, changed("Qwen/Qwen3.5-0.8B (text)")),
    "gemma, the factor": (gemma.mended, FURTHER["Gemma with a width that is no square"]),
    "gemma, the keys": (gemma.mended, changed(GEMMA)),
    "lm_head": (lm_head.mended, changed("ibm-granite/granite-4.0-micro", shared_intermediate_size=256)),
    "longrope": (longrope.mended, FURTHER["longrope without the older key"]),
    "rope, yarn's ends": (rope.mended, FURTHER["Qwen2 with yarn"]),
    "rope, Llama's": (rope.mended, FURTHER["Llama with a linear rope"]),
    "text_models, Qwen3.5": (text_models.mended, changed("Qwen/Qwen3.5-0.8B (text)")),
    "text_models, Ministral 3": (text_models.mended, changed("mistralai/Ministral-3-3B-Instruct-2512 (text)")),
}


@pytest.mark.parametrize("case", MENDED)
def test_the_builder_needs_this_correction(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the correction can be removed."""
    mend, config = MENDED[case]
    monkeypatch.setattr(genai_builder, "MENDS", [other for other in genai_builder.MENDS if other is not mend])
    checkpoint = make_family(tmp_path / "checkpoint", config)
    try:
        proof = prove(checkpoint)
    except BadInput as refusal:
        assert refusal.code == "family-not-built"
    else:
        assert proof.distance > SOUND


def test_a_proof_is_stored_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_family(tmp_path / "checkpoint", small_config(LLAMA))
    assert not prove(checkpoint).known
    monkeypatch.setattr(genai_builder, "make_model", None)
    again = prove(checkpoint)
    assert (again.known, again.first_difference) == (True, None)
    monkeypatch.setattr(family_proof, "proof_versions", lambda: {"onnxruntime-genai": "0.19"})
    with pytest.raises(BadInput, check=coded("family-not-built")):
        prove(checkpoint)


def test_a_known_model_is_shipped_and_costs_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fine-tune writes what another library would: whole numbers as floats, roles of tokens, its own fields.

    When this fails for its versions: `python -m tests.support.prove_families`.
    """
    monkeypatch.setattr(genai_builder, "make_model", None)
    config = {**REAL[LLAMA], "vocab_size": 1021, "rope_theta": 100000.0, "unk_token_id": 0, "unsloth_version": "1"}
    proof = prove(make_family(tmp_path / "checkpoint", config))
    assert (proof.known, proof.first_difference) == (True, None)


def test_a_difference_names_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genai_builder, "MENDS", ())
    checkpoint = make_family(tmp_path / "checkpoint", small_config("mistralai/Mistral-7B-v0.1"))
    first = prove(checkpoint).first_difference
    assert first is not None
    assert (first["tokens"], first["position"], first["generating"]) == (72, 48, False)  # the window is 48


HOSTILE: dict[str, dict[str, Any]] = {
    "a head that is no whole number": {"num_attention_heads": 3},
    "an activation that nobody has": {"hidden_act": "os.system"},
    "a text for a number": {"rms_norm_eps": "small"},
    "an unknown rotary embedding": {"rope_scaling": {"rope_type": "foreign"}},
    "layers of an unknown kind": {"layer_types": ["foreign", "foreign"]},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_config_that_does_not_work_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    checkpoint = make_family(tmp_path / "checkpoint", small_config(LLAMA))
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **HOSTILE[case]}), "utf-8")
    with pytest.raises(BadInput, check=coded("family-not-built")) as refusal:
        prove(checkpoint)
    assert "\n" not in refusal.value.message


def test_missing_weights_are_reported(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = make_family(tmp_path / "checkpoint", small_config("LiquidAI/LFM2-350M"))
    tensors = load_file(checkpoint / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if "layers.1.feed_forward.w2" not in name}
    save_file(lacking, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, check=coded("family-not-built", "layers.1.feed_forward.w2")):
        prove(checkpoint)


# Of each mend a family; of two with the same, the one whose embedding is multiplied by a factor.
QUANTIZED = [
    "Qwen/Qwen3.5-0.8B (text)",
    "google/gemma-2-2b-it",
    "google/gemma-3-4b-it (text)",
    "microsoft/Phi-4-mini-instruct",
    "mistralai/Ministral-3-3B-Instruct-2512 (text)",
    "ibm-granite/granite-4.0-micro",
    "LiquidAI/LFM2-350M",
]
LARGEST_MEAN_DISTANCE = {"fp16": 0.01, "int8": 0.15, "int4": 1.5}  # of the wide random weights here


@pytest.mark.parametrize("model", QUANTIZED)
def test_every_precision_runs_and_stays_close(model: str, tmp_path: Path) -> None:
    checkpoint = make_family(tmp_path / "checkpoint", small_config(model))
    cut = cut_checkpoint(checkpoint, AutoConfig.from_pretrained(checkpoint), tmp_path / "cut")
    trials = reference_trials(cut.folder, cut.parameters)[:2]
    for precision, largest in LARGEST_MEAN_DISTANCE.items():
        built = tmp_path / precision
        built.mkdir()
        genai_builder.make_model(cut.folder, built, {"precision": precision})
        distances = [difference.distance for difference in differences(built, trials, threads=1)]
        assert sum(distances) / len(distances) < largest, precision


def test_gemma_3_with_its_real_weights_has_the_same_top_token_at_every_position(tmp_path: Path) -> None:
    """A text longer than the window of 512; int4 is built of it too."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = real_model("gemma3-270m")
    text = "\n".join((DOCS / "architecture.md").read_text("utf-8").splitlines()[:40])
    tokens = AutoTokenizer.from_pretrained(checkpoint)(text).input_ids[:540]
    assert len(tokens) == 540
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    del model
    for precision, least, count in (("fp32", 1.0, 540), ("int4", 0.5, 80)):
        built = tmp_path / precision
        built.mkdir()
        genai_builder.make_model(checkpoint, built, {"precision": precision})
        found = logits_of(built, tokens[:count])
        assert (found.argmax(-1) == expected[:count].argmax(-1)).mean() >= least, precision
        if precision == "fp32":
            assert np.abs(found - expected).max() < 1e-3
        shutil.rmtree(built)
