import math
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import BadInput
from slmops.infra.genai.calls import ComparedText
from slmops.infra.settings import EvaluationSettings, Settings
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, Source, StoredVariant, digest_of
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.version import Version
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.exam import Bench, examine
from slmops.tasks.exams.source import run_source_once, sources_in_use
from slmops.tasks.exams.text import (
    BYTES_PER_TOKEN,
    TextExam,
    TextSample,
    compare_on_text,
    read_text,
    read_text_file,
    summarize,
)
from slmops.tasks.workshop import Workshop, working_in
from tests.support.checkpoints import SENTENCES, make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model, with_weights_set
from tests.support.versions import evidence, stored_variant


@given(st.text(min_size=1, max_size=300), st.integers(1, 20), st.booleans())
def test_the_beginning_of_any_text_is_read_in_complete_characters(tmp_path_factory, text, tokens, byte_order_mark):
    path = tmp_path_factory.getbasetemp() / "good.txt"
    path.write_bytes(text.encode("utf-8-sig" if byte_order_mark else "utf-8"))
    text = text.removeprefix("\ufeff") if not byte_order_mark else text
    try:
        sample = read_text_file(path, tokens)
    except BadInput as error:
        assert "\0" in text or not text[: tokens * BYTES_PER_TOKEN].strip()
        assert error.what_to_do
        return
    assert text.startswith(sample.text)
    size = len(sample.text.encode()) + (3 if byte_order_mark or path.read_bytes()[:3] == b"\xef\xbb\xbf" else 0)
    assert size <= tokens * BYTES_PER_TOKEN
    assert sample.text == text or size > tokens * BYTES_PER_TOKEN - 4


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_words(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    try:
        assert read_text_file(path, 2).text.strip()
    except BadInput as error:
        assert "any.txt" in error.message
        assert error.what_to_do


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        (b"", coded("text-file-empty")),
        (b" \n\t\n", coded("text-file-empty")),
        (b"\xef\xbb\xbf", coded("text-file-empty")),
        (b"PK\x03\x04\x00\x00", coded("text-file-not-text", "byte 5")),
        ("naïve".encode("latin-1"), coded("text-file-not-utf8", "byte 3")),
        ("naïve".encode("utf-16"), coded("text-file-not-text")),
        (b"cut off: \xe6\x9d", coded("text-file-not-utf8")),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, refused):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(BadInput, check=refused) as caught:
        read_text_file(tmp_path / "text.txt", 100)
    assert caught.value.exit_code == 2


def test_missing_files_folders_and_odd_names_are_refused(tmp_path):
    with pytest.raises(BadInput, check=coded("text-file-unreadable", "No such file")):
        read_text_file(tmp_path / "none.txt", 10)
    with pytest.raises(BadInput, check=coded("text-file-unreadable")):
        read_text_file(tmp_path, 10)
    with pytest.raises(BadInput, check=coded("text-file-unreadable")):
        read_text_file(Path("null\0.txt"), 10)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX has named pipes")
def test_a_pipe_that_nobody_writes_to_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, check=coded("text-file-unreadable")):
        read_text_file(tmp_path / "pipe", 10)


def test_of_a_huge_file_only_the_beginning_is_read(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.write("東京 ".encode() * 100)
        file.truncate(20 * 2**30)  # sparse: 20 GiB of null bytes that must not be looked at
    sample = read_text_file(path, 10)
    assert len(sample.text.encode()) in range(10 * BYTES_PER_TOKEN - 3, 10 * BYTES_PER_TOKEN + 1)


def window(tokens=10, variant=-20.0, reference=-10.0, positions=4, agreeing=4, kl=0.0):
    return {
        "tokens": tokens,
        "finite_tokens": tokens if variant is not None else 0,
        "log_probability": variant,
        "reference_log_probability": reference,
        "positions": positions,
        "agreeing": agreeing,
        "nearly_agreeing": min(agreeing + 1, positions),
        "kl_divergence": kl,
    }


def summarized(*windows, **changes):
    result = {
        "windows": windows,
        "tokens": 1,
        "window_tokens": 10,
        "kl_divergence_p99": 0.5,
        "last_position_only": False,
    }
    return summarize(ComparedText(**result | changes, threads=1, versions={}), "text.txt")


def test_figures_are_means_per_token_over_the_windows():
    found = summarized(
        window(10, -20.0, -10.0, 4, 4, 0.4), window(5, -5.0, -5.0, 2, 1, 0.6), window(1, -2.0, -1.0, 0, 0, None)
    )
    assert found.perplexity == pytest.approx(math.exp(27 / 16))
    assert found.reference_perplexity == pytest.approx(math.exp(1))
    assert found.perplexity_ratio.value == pytest.approx(found.perplexity / found.reference_perplexity)
    assert 1 <= found.perplexity_ratio.low < found.perplexity_ratio.value < found.perplexity_ratio.high <= math.e
    assert found.positions == 6
    assert found.top1_agreement.value == pytest.approx(5 / 6)
    assert (found.top1_agreement.low, found.top1_agreement.high) == (0.5, 1.0)
    assert found.near_agreement.value == 1
    assert found.kl_divergence.value == pytest.approx(1 / 6)
    assert found.finite_logits == 1


def test_unknown_figures_are_none():
    broken = summarized(window(), window(variant=None, agreeing=0, kl=None), kl_divergence_p99=None)
    assert (broken.perplexity, broken.perplexity_ratio, broken.kl_divergence) == (None, None, None)
    assert broken.reference_perplexity is not None
    assert broken.top1_agreement.value == 0.5
    assert broken.finite_logits == 0.5
    alone = summarized(window(reference=None, positions=0, agreeing=0, kl=None), kl_divergence_p99=None)
    assert alone.perplexity == pytest.approx(math.exp(2))
    assert (alone.reference_perplexity, alone.perplexity_ratio, alone.top1_agreement) == (None, None, None)
    hopeless = summarized(window(variant=-1e6))
    assert (hopeless.perplexity, hopeless.perplexity_ratio) == (None, None)
    assert summarized(window(), last_position_only=True).notes


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("perplexity")


@pytest.fixture(scope="module")
def checkpoint(work):
    return make_tiny_checkpoint(work / "checkpoint", tied=False)


@pytest.fixture(scope="module")
def model_dir(work, checkpoint):
    return build_genai_model(checkpoint, work / "fp32")


def store(registry, checkpoint, folders, parameters=100_000):
    source = Source(digest="a" * 64, origin=str(checkpoint), architecture="Qwen2ForCausalLM", parameters=parameters)
    variants = [stored_variant(registry, folder, precision) for precision, folder in folders.items()]
    manifest, _ = registry.commit("home", source, {"onnxruntime-genai": "0.18.0"}, variants)
    prepared = PreparedCheckpoint(
        uri=checkpoint.as_uri(), origin=str(checkpoint), digest="a" * 64, inspection=inspect_checkpoint(checkpoint)
    )
    return manifest, prepared


def test_variants_are_compared_once_and_the_reference_is_kept_until_then(
    checkpoint, model_dir, home, tmp_path, torch_stays
):
    settings = Settings(home=home, evaluation=EvaluationSettings(max_text_tokens=400, max_positions=60))
    registry = open_registry(settings)
    changed = with_weights_set(model_dir, tmp_path / "changed", "final_norm", 0.5)
    manifest, prepared = store(registry, checkpoint, {"fp16": model_dir, "int4": changed})
    exact, worse = registry.of(manifest).variant("fp16"), registry.of(manifest).variant("int4")
    draw = random.Random(0)
    (tmp_path / "home.txt").write_text("\n".join(draw.choice(SENTENCES) for _ in range(60)), "utf-8")
    with working_in(Workshop(settings, registry)):
        exam = TextExam(read_text.fn(str(tmp_path / "home.txt")))
        folder = exam.source_folder(prepared.digest, settings)
        assert exam.needs_source([exact, worse], settings)
        with sources_in_use([exam], prepared.digest):
            run_source_once.fn(exam, prepared)
            written = (folder / "logits.npy").stat()
            run_source_once.fn(exam, prepared)
            assert (folder / "logits.npy").stat().st_mtime_ns == written.st_mtime_ns
            compared = examine.fn(exam, exact)
            assert exam.needs_source([exact, worse], settings)
            other = examine.fn(exam, worse)
            assert not exam.needs_source([exact, worse], settings)
        again = examine.fn(exam, exact)
        assert again == compared == exam.known(exact, settings)
    assert not folder.exists()

    assert compared.tokens == 400
    assert compared.positions == 60
    assert compared.perplexity_ratio.value == pytest.approx(1, abs=1e-4)
    assert compared.top1_agreement.value == 1
    assert compared.kl_divergence.value < 1e-6
    assert other.kl_divergence.value > 0.1
    assert other.perplexity_ratio.value == pytest.approx(other.perplexity / other.reference_perplexity)
    assert other.perplexity_ratio.low < other.perplexity_ratio.value < other.perplexity_ratio.high
    assert other.reference_perplexity == compared.reference_perplexity
    assert compared.origin == "home.txt"

    assert len(list(evidence(registry, manifest, "text"))) == 2
    assert not list((settings.cache_dir / "work").iterdir())


def test_a_model_without_a_checkpoint_has_a_perplexity_only(model_dir, settings, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES), "utf-8")
    text = read_text_file(tmp_path / "text.txt", 1000)
    found = compare_on_text(settings, Bench(model_dir, tmp_path / "work"), text, reference_dir=None)
    assert found.perplexity > 1
    assert found.positions == 0
    assert (found.reference_perplexity, found.perplexity_ratio, found.kl_divergence) == (None, None, None)


def test_a_text_of_one_token_is_bad_input_not_a_failed_stage(model_dir, settings, tmp_path):
    text = TextSample(origin="a.txt", text="a", digest=digest_of("a"))
    with pytest.raises(BadInput, check=coded("text-too-short")):
        compare_on_text(settings, Bench(model_dir, tmp_path / "work"), text, reference_dir=None)


def variant_of(source_digest):
    stored = StoredVariant(
        precision="int4", device="cpu", execution_provider="cpu", recipe="r", recipe_digest="b" * 64, files=()
    )
    source = Source(digest=source_digest, origin="x", architecture="x", parameters=1)
    manifest = Manifest(name="home", version=1, source=source, builder={}, variants=(stored,), created_at="")
    return Version(ModelRegistry(LocalObjectStore(Path("unused"))), manifest).variants[0]


def test_the_key_depends_on_variant_source_text_and_size():
    text = TextSample(origin="a.txt", text="a b", digest="1" * 64)
    settings = Settings()
    smaller = Settings(evaluation=EvaluationSettings(max_text_tokens=100))

    def key(text, settings, source="a"):
        return TextExam(text).key(variant_of(source * 64), settings)

    keys = [
        key(text, settings),
        key(text, settings, "c"),
        key(text.model_copy(update={"digest": "2" * 64}), settings),
        key(text, smaller),
    ]
    assert len(set(keys)) == 4
    renamed = text.model_copy(update={"origin": "b.txt"})
    assert key(renamed, settings) == keys[0]
