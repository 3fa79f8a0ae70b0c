import json
import random
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.genai.calls import CompareText
from slmops.infra.genai.text import begin_tokens_of, compare_text
from slmops.infra.process.supervisor import ChildProcess, run_in_child
from slmops.infra.reference.text import LOGITS_CHUNK_BYTES, compared_positions, cut_windows, scored_positions
from slmops.infra.transformers.calls import ScoreTextAsSource
from slmops.infra.transformers.text import score_text
from tests.support.checkpoints import SENTENCES, make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model, logits_of, with_a_slice, with_weights_set
from tests.support.lm_eval_tasks import add_begin_token

WINDOW = 48
POSITIONS = 40
BEGIN = "<|begin_of_text|>"


def ignore_progress(done, total, what):
    assert 0 <= done <= total
    assert what


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=60),
    st.lists(st.integers(10, 12), max_size=2),
    st.integers(2, 20),
    st.integers(1, 80),
)
def test_windows_hold_the_text_and_every_token_with_a_predecessor_is_scored_once(tokens, begin, size, most):
    windows = cut_windows(tokens, begin, size)
    held = [token for window in windows for token in window[len(begin) :]]
    assert held == (tokens if begin or len(tokens) % size != 1 else tokens[:-1])
    scored = [[window[position + 1] for position in scored_positions(window, begin)] for window in windows]
    assert scored == [window[len(begin) :] if begin else window[1:] for window in windows]
    chosen = compared_positions(windows, begin, most)
    assert sum(map(len, chosen)) == min(most, sum(map(len, scored)))
    for window, positions in zip(windows, chosen, strict=True):
        assert set(positions) <= set(scored_positions(window, begin))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    (folder / "text.txt").write_text("\n".join(draw.choice(SENTENCES) for _ in range(14)), "utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(work):
    return make_tiny_checkpoint(work / "checkpoint", tied=False)


@pytest.fixture(scope="module")
def checkpoint_with_begin(work):
    made = make_tiny_checkpoint(work / "with-begin", family="llama", chat_template="llama3", tied=False)
    return add_begin_token(made, BEGIN)


@pytest.fixture(scope="module")
def model_dir(work, checkpoint):
    return build_genai_model(checkpoint, work / "fp32")


@pytest.fixture(scope="module")
def reference_dir(work, checkpoint):
    run_reference(checkpoint, work / "reference", work / "text.txt")
    return work / "reference"


def run_reference(checkpoint, directory, text_file, **changes):
    request = {
        "checkpoint_dir": str(checkpoint),
        "text_file": str(text_file),
        "max_tokens": 250,
        "window_tokens": WINDOW,
        "max_positions": POSITIONS,
        "threads": 2,
        "output_dir": str(directory),
    }
    return score_text(ScoreTextAsSource(**request | changes), ignore_progress).model_dump(mode="json")


def run_compare(model_dir, reference_dir, text_file, **changes):
    request = {
        "model_dir": str(model_dir),
        "text_file": str(text_file),
        "reference_dir": None if reference_dir is None else str(reference_dir),
        "max_tokens": 250,
        "window_tokens": WINDOW,
        "threads": 2,
    }
    return compare_text(CompareText(**request | changes), ignore_progress).model_dump(mode="json")


def whole_passes(checkpoint, text_file, max_tokens=250):
    """Windows by slicing the tokenizer's ids, and float64 log-probabilities of one whole forward pass of each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer(text_file.read_text("utf-8"), add_special_tokens=False)["input_ids"][:max_tokens]
    begin = tokenizer("")["input_ids"]
    found = []
    for start in range(0, len(ids), WINDOW):
        window = begin + ids[start : start + WINDOW]
        with torch.inference_mode():
            logits = model(torch.tensor([window])).logits[0]
        found.append((window, special.log_softmax(logits.numpy().astype(np.float64), axis=-1)))
    return begin, found


@pytest.mark.parametrize("family", ["checkpoint", "checkpoint_with_begin"])
def test_the_reference_scores_every_token_like_a_single_pass(family, request, work, tmp_path):
    folder = request.getfixturevalue(family)
    result = run_reference(folder, tmp_path, work / "text.txt", chunk_bytes=7 * 4 * 512)  # seven positions at a time
    begin, expected = whole_passes(folder, work / "text.txt")
    assert result["begin"] == begin
    assert bool(begin) == (family == "checkpoint_with_begin")
    assert result["tokens"] == 250
    written = np.load(tmp_path / "logits.npy")
    assert written.shape == (POSITIONS, 512)
    line = 0
    for window, (token_ids, log_probabilities) in zip(result["windows"], expected, strict=True):
        assert window["token_ids"] == token_ids
        first = max(1, len(begin))
        own = [log_probabilities[index - 1, token_ids[index]] for index in range(first, len(token_ids))]
        np.testing.assert_allclose(window["log_probabilities"], own, atol=1e-4)
        for position in window["positions"]:
            np.testing.assert_allclose(
                special.log_softmax(written[line].astype(np.float64)), log_probabilities[position], atol=1e-4
            )
            line += 1
    assert line == POSITIONS


def test_positions_are_spread_over_the_whole_text(reference_dir):
    windows = json.loads((reference_dir / "text.json").read_text())["windows"]
    counts = [len(window["positions"]) for window in windows]
    shares = [POSITIONS * len(window["log_probabilities"]) / (250 - len(windows)) for window in windows]
    assert all(abs(count - share) <= 1 for count, share in zip(counts, shares, strict=True))


def sums(result, key):
    return [window[key] for window in result["windows"]]


def test_an_exact_variant_has_the_references_figures(model_dir, reference_dir, work):
    result = run_compare(model_dir, reference_dir, work / "text.txt")
    np.testing.assert_allclose(sums(result, "log_probability"), sums(result, "reference_log_probability"), rtol=1e-5)
    assert sums(result, "agreeing") == sums(result, "positions")
    assert sum(sums(result, "positions")) == POSITIONS
    assert sum(sums(result, "kl_divergence")) < 1e-5
    assert result["tokens"] == 250
    assert not result["last_position_only"]


def test_without_a_reference_the_same_tokens_are_scored(
    model_dir, reference_dir, checkpoint_with_begin, work, tmp_path
):
    known = run_compare(model_dir, reference_dir, work / "text.txt")
    alone = run_compare(model_dir, None, work / "text.txt")
    assert sums(alone, "log_probability") == sums(known, "log_probability")
    assert sums(alone, "reference_log_probability") == [None] * len(alone["windows"])
    assert sum(sums(alone, "positions")) == 0
    begun = build_genai_model(checkpoint_with_begin, tmp_path / "begun")
    run_reference(checkpoint_with_begin, tmp_path / "reference", work / "text.txt")
    known = run_compare(begun, tmp_path / "reference", work / "text.txt")
    alone = run_compare(begun, None, work / "text.txt")
    assert sums(alone, "tokens") == [WINDOW] * 5 + [10]
    assert sums(alone, "log_probability") == sums(known, "log_probability")
    assert len(begin_tokens_of(begun)) == 1


def test_a_lossy_variants_figures_are_those_of_its_own_logits(checkpoint, reference_dir, work, tmp_path):
    lossy = build_genai_model(checkpoint, tmp_path / "int4", precision="int4")
    result = run_compare(lossy, reference_dir, work / "text.txt", chunk_bytes=4 * 7 * 4 * 512)
    positions = [window["positions"] for window in json.loads((reference_dir / "text.json").read_text())["windows"]]
    divergences = []
    for index, (token_ids, reference) in enumerate(whole_passes(checkpoint, work / "text.txt")[1]):
        variant = special.log_softmax(logits_of(lossy, token_ids).astype(np.float64), axis=-1)
        own = sum(variant[place - 1, token_ids[place]] for place in range(1, len(token_ids)))
        kl = special.rel_entr(np.exp(reference), np.exp(variant)).sum(axis=-1)[positions[index]]
        agreeing = (reference.argmax(axis=-1) == variant.argmax(axis=-1))[positions[index]]
        window = result["windows"][index]
        assert window["log_probability"] == pytest.approx(own, rel=1e-3)
        assert window["kl_divergence"] == pytest.approx(kl.sum(), rel=2e-2)
        assert abs(window["agreeing"] - agreeing.sum()) <= 1  # a tie within rounding
        divergences += list(kl)
    assert result["kl_divergence_p99"] == pytest.approx(np.percentile(divergences, 99), rel=2e-2)
    assert result["kl_divergence_p99"] > 1e-3


def test_a_model_that_gives_the_last_position_only_has_the_same_figures(
    checkpoint, model_dir, reference_dir, work, tmp_path
):
    pruned = build_genai_model(checkpoint, tmp_path / "pruned", prune_lm_head=True)
    assert not run_compare(pruned, reference_dir, work / "text.txt")["last_position_only"]
    result = run_compare(with_a_slice(pruned), reference_dir, work / "text.txt")
    assert result["last_position_only"]
    expected = run_compare(model_dir, reference_dir, work / "text.txt")
    np.testing.assert_allclose(sums(result, "log_probability"), sums(expected, "log_probability"), rtol=1e-5)
    assert sums(result, "agreeing") == sums(expected, "agreeing")


def test_logits_that_are_not_finite_leave_figures_unknown(model_dir, reference_dir, work, tmp_path):
    broken = with_weights_set(model_dir, tmp_path / "broken", "final_norm", float("nan"))
    result = run_compare(broken, reference_dir, work / "text.txt")
    for key in ("log_probability", "kl_divergence"):
        assert set(sums(result, key)) == {None}
    assert set(sums(result, "finite_tokens")) == set(sums(result, "agreeing")) == {0}
    assert result["kl_divergence_p99"] is None


def test_a_checkpoint_with_damaged_weights_is_named(checkpoint, work, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageFailed, check=coded("logits-not-finite")):
        run_reference(broken, tmp_path / "reference", work / "text.txt")


def test_a_text_of_one_token_is_refused_on_either_side(checkpoint, model_dir, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(BadInput, check=coded("text-too-short", "1 token")):
        run_reference(checkpoint, tmp_path / "reference", tmp_path / "one.txt")
    with pytest.raises(BadInput, check=coded("text-too-short", "1 token")):
        run_compare(model_dir, None, tmp_path / "one.txt")
    (tmp_path / "two.txt").write_text("a b")
    assert sums(run_compare(model_dir, None, tmp_path / "two.txt"), "tokens") == [1]


def test_a_reference_of_another_text_or_another_vocabulary_is_refused(model_dir, reference_dir, work, tmp_path):
    (tmp_path / "other.txt").write_text("another text")
    with pytest.raises(StageFailed, check=coded("reference-of-another-text")):
        run_compare(model_dir, reference_dir, tmp_path / "other.txt")
    other = shutil.copytree(reference_dir, tmp_path / "reference")
    content = json.loads((other / "text.json").read_text())
    (other / "text.json").write_text(json.dumps(content | {"vocabulary_size": 600, "tokenizer_size": 600}))
    with pytest.raises(StageFailed, check=coded("reference-of-other-vocabulary")):
        run_compare(model_dir, other, work / "text.txt")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text_for_a_vocabulary_of_152_k(tmp_path):
    """All logits of the longer text would be 445 MiB more than those of the shorter one."""
    checkpoint = make_tiny_checkpoint(
        tmp_path / "checkpoint", vocab_size=152_064, hidden_size=32, intermediate_size=32, num_hidden_layers=1
    )
    model_dir = build_genai_model(checkpoint, tmp_path / "model")
    draw = random.Random(0)
    (tmp_path / "text.txt").write_text("\n".join(draw.choice(SENTENCES) for _ in range(200)), "utf-8")
    peaks: dict[int, list[int]] = {}
    with ChildProcess({"MALLOC_ARENA_MAX": "1"}) as source:
        for tokens in (256, 1024):
            folder = tmp_path / str(tokens)
            shared = {
                "text_file": tmp_path / "text.txt",
                "max_tokens": tokens,
                "window_tokens": 256,
                "threads": 1,
            }
            calls = {
                source: ScoreTextAsSource(
                    checkpoint_dir=checkpoint, output_dir=folder, max_positions=tokens // 2, **shared
                ),
                None: CompareText(model_dir=model_dir, reference_dir=folder, **shared),
            }
            options = {"deadline_s": 600, "log_path": folder / "child.log", "work_dir": folder}
            peaks[tokens] = [
                run_in_child(call, within=within, **options).peak_rss_bytes for within, call in calls.items()
            ]
    for short, long in zip(peaks[256], peaks[1024], strict=True):
        assert long < short + 3 * LOGITS_CHUNK_BYTES  # some of them are kept by the allocator
        assert long < 2 * 2**30
    print({tokens: [round(peak / 2**20) for peak in found] for tokens, found in peaks.items()})
