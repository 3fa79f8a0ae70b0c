"""The peer: llama.cpp, built from the source that the llama-cpp-python sdist carries, and kept in the user's cache.

`peer()` takes about ten minutes and 1 GB of disk the first time, and nothing after that. What it makes lies in
`slmops-bench/` of the user's cache folder (`XDG_CACHE_HOME`), one folder a version; delete it to build anew.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from tests.benchmarks.watching import Watched, run_watched
from tests.support.packages import RealModelMissing
from tests.support.real_models import LLAMA_CPP, real_model

VERSION = LLAMA_CPP.version  # of llama-cpp-python; its source names the commit of llama.cpp
TOOLS = ("llama-quantize", "llama-bench", "llama-imatrix", "llama-logits")
OWN_TOOL = Path(__file__).with_name("logits.cmake")  # `llama-logits`
BUILD_JOBS = 2
Logits = NDArray[np.float32]
# Only these tools: no server, no web page, no test, nothing that is fetched while it builds.
CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_MTMD": "OFF",
}
# The converter knows pre-tokenizers by a hash of what they make of a text. A tokenizer that is trained for a test has
# Qwen2's pre-tokenizer and none of the known hashes, as its vocabulary is another one. And it looks for a SentencePiece
# model before it reads tokenizer.json, for which it wants a package that our checkpoints have no use for.
CONVERTER = """\
import runpy
import sys

sys.path[:0] = [{source!r}, {package!r}]
from conversion.base import TextModel


def no_sentencepiece_model(self):
    raise FileNotFoundError


TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
TextModel._set_vocab_sentencepiece = no_sentencepiece_model
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@dataclass(frozen=True)
class BenchResult:
    """Median tok/s of prompt and generation, the wall of a run that loads and makes one token in s, peak RSS in bytes.

    `start_s` has the start of the process in it, and no warm-up.
    """

    prompt_tps: float
    generation_tps: float
    start_s: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class LlamaCpp:
    """A built llama.cpp in its folder of the cache."""

    folder: Path

    @property
    def version(self) -> str:
        """The version of the sdist that it was built from."""
        return f"llama-cpp-python {VERSION}"

    def convert(self, checkpoint: Path, out: Path) -> Watched:
        """Convert a checkpoint to a GGUF file in f16.

        Where the checkpoint's embedding has more rows than its tokenizer has tokens, the converter invents the rest.
        """
        source = self.folder / "source" / "vendor" / "llama.cpp"
        text = CONVERTER.format(
            source=str(source), package=str(source / "gguf-py"), script=str(source / "convert_hf_to_gguf.py")
        )
        script = self.folder / "convert.py"
        script.write_text(text, "utf-8")
        command: list[str | Path] = [sys.executable, script, checkpoint, "--outfile", out, "--outtype", "f16"]
        return run_watched(command, log=out.with_suffix(".log"), environment=_offline())

    def quantize(
        self, source: Path, out: Path, type_name: str, threads: int = 2, *, importance: Path | None = None
    ) -> Watched:
        """Quantize an f16 GGUF file to a type such as `Q4_0`, weighing by an importance matrix where one is given."""
        options: list[str | Path] = ["--imatrix", importance] if importance else []
        command: list[str | Path] = [self._tool("llama-quantize"), *options, source, out, type_name, str(threads)]
        return run_watched(command, log=out.with_suffix(".log"))

    def importance(self, source: Path, text: Path, threads: int = 2) -> Path:
        """Make the importance matrix of an f16 GGUF file on a text, in pieces of 512 tokens."""
        out = text.with_suffix(".imatrix")
        options = ["-t", str(threads), "-ngl", "0", "--parse-special"]
        command = [self._tool("llama-imatrix"), "-m", source, "-f", text, "-o", out, *options]
        run_watched(command, log=out.with_suffix(".log"))
        return out

    def logits(self, gguf: Path, rows: Sequence[Sequence[int]], first: Sequence[int], threads: int = 2) -> list[Logits]:
        """Return for each row of token ids its logits [tokens - first, vocabulary] from a position on, in fp32."""
        with tempfile.TemporaryDirectory(dir=gguf.parent) as work:
            out = Path(work) / "logits"
            self._evaluated(gguf, [(at, 0, row) for at, row in zip(first, rows, strict=True)], out, threads)
            found = np.fromfile(out, np.float32)
        lengths = [len(row) - at for row, at in zip(rows, first, strict=True)]
        vocabulary = len(found) // sum(lengths)
        return np.split(found.reshape(-1, vocabulary), np.cumsum(lengths)[:-1])

    def answers(self, gguf: Path, rows: Sequence[Sequence[int]], new: int, threads: int = 2) -> list[list[int]]:
        """Return the greedy answer to each row of token ids: `new` tokens at most, without the end token."""
        with tempfile.TemporaryDirectory(dir=gguf.parent) as work:
            lines = self._evaluated(gguf, [(0, new, row) for row in rows], Path(work) / "logits", threads)
        return [[int(token) for token in line.split()] for line in lines.splitlines()]

    def _evaluated(self, gguf: Path, asked: Sequence[tuple[int, int, Sequence[int]]], out: Path, threads: int) -> str:
        rows = out.with_name("rows")
        rows.write_text("".join(f"{first} {new} {' '.join(map(str, ids))}\n" for first, new, ids in asked), "utf-8")
        command: list[str | Path] = [self._tool("llama-logits"), gguf, rows, out, str(threads)]
        return run_watched(command, log=gguf.with_suffix(".log")).output

    def bench(self, gguf: Path, *, prompt: int = 128, new: int = 64, threads: int = 2, rounds: int = 5) -> BenchResult:
        """Measure as llama-bench does: after a warm-up, `new` tokens after a prompt of `prompt`, timed apart."""
        fixed = ["-m", str(gguf), "-t", str(threads), "-ngl", "0", "-o", "json"]
        log = gguf.with_suffix(".log")
        several = ["-r", str(rounds)]
        prompts = self._bench([*fixed, *several, "-p", str(prompt), "-n", "0"], log)
        tokens = self._bench([*fixed, *several, "-p", "0", "-n", str(new), "-d", str(prompt)], log)
        start = self._bench([*fixed, "-r", "1", "--no-warmup", "-p", "0", "-n", "1"], log)
        return BenchResult(
            prompt_tps=_median_tps(prompts),
            generation_tps=_median_tps(tokens),
            start_s=start.seconds,
            peak_rss_bytes=max(prompts.peak_rss_bytes, tokens.peak_rss_bytes),
        )

    def _bench(self, arguments: list[str], log: Path) -> Watched:
        return run_watched([self._tool("llama-bench"), *arguments], log=log)

    def _tool(self, name: str) -> Path:
        return _tool_in(self.folder, name)


def _median_tps(run: Watched) -> float:
    (test,) = json.loads(run.output)
    samples = sorted(test["samples_ts"])
    return float(samples[len(samples) // 2])


def cache_folder() -> Path:
    """Return where this version is kept."""
    return user_cache_path("slmops-bench", appauthor=False) / f"llama-cpp-python-{VERSION}"


def peer() -> LlamaCpp | None:
    """Return llama.cpp, built now if necessary; None, with the reason printed, if it cannot be built."""
    folder = cache_folder()
    if all(_tool_in(folder, name).is_file() for name in TOOLS):
        return LlamaCpp(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    print(f"llama.cpp is built into {folder}, which takes about ten minutes once ...", flush=True)
    try:
        _fetch_source(folder)
        _build(folder, log)
    except (OSError, ValueError, subprocess.CalledProcessError, tarfile.TarError, RealModelMissing) as error:
        told = f" Its log: {log}" if log.is_file() else ""
        print(f"llama.cpp could not be built, and the rows have no peer: {error}{told}", flush=True)
        return None
    return LlamaCpp(folder)


def _fetch_source(folder: Path) -> None:
    source = folder / "source"
    if source.is_dir():
        return
    aside = folder / "source.aside"
    shutil.rmtree(aside, ignore_errors=True)
    with tarfile.open(real_model("llama-cpp.tar.gz")) as packed:
        packed.extractall(aside, filter="data")  # refuses whatever would land outside of the folder
    (unpacked,) = aside.iterdir()
    unpacked.rename(source)
    shutil.rmtree(aside)


def _build(folder: Path, log: Path) -> None:
    source, build = folder / "source" / "vendor" / "llama.cpp", folder / "build"
    cmake, ninja = _build_tools(folder, log)
    options = [f"-D{name}={value}" for name, value in CMAKE_OPTIONS.items()]
    options.append(f"-DCMAKE_PROJECT_INCLUDE={OWN_TOOL}")
    options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    _run([cmake, "-S", str(source), "-B", str(build), *options], log)
    _run([cmake, "--build", str(build), "--config", "Release", "--target", *TOOLS, "-j", str(BUILD_JOBS)], log)


def _build_tools(folder: Path, log: Path) -> tuple[str, str | None]:
    """Return cmake, and ninja if available: the system's, else those of the package index in an environment here."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake:
        return cmake, ninja
    tools = folder / "tools"
    venv.create(tools, with_pip=True)
    _run([_python_in(tools), "-m", "pip", "install", "--quiet", "cmake", "ninja"], log)
    binaries = _python_in(tools).parent
    return str(binaries / "cmake"), str(binaries / "ninja")


def _python_in(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _tool_in(folder: Path, name: str) -> Path:
    return folder / "build" / "bin" / (f"{name}.exe" if os.name == "nt" else name)


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _run(command: list[str | Path], log: Path) -> None:
    with log.open("ab") as stream:
        subprocess.run(command, check=True, stdout=stream, stderr=stream)
