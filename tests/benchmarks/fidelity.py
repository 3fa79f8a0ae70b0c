"""Compare quantized variants with llama.cpp's of the same real checkpoints: bytes, distance, score and speed.

Run as `python -m tests.benchmarks.fidelity [--model smollm2-off-grid gemma3-270m] [--recipes int4-rtn int4 ...]
[--types Q4_0 ...] [--without-peer] [--without-speed] [--work FOLDER] [--plot FILE] [--json FILE] [--write FILE]`. The
default checkpoints are SmolLM2-135M-Instruct with its weights moved off the grid of the GGUF that they come from, and
Gemma 3 270M. llama.cpp's formats are measured of the first one only: on the grid of a GGUF, they look better than they
are. So are all recipes of int4 and int8; of the other one those are measured that a deploy takes by itself.

All are compared with the checkpoint in fp32 on the same token ids: those of its own greedy answers to the built-in
chats and to the questions of fidelity_questions.jsonl, whose expected answers give the score. slmops' variants run in
onnxruntime-genai, llama.cpp's in llama.cpp (tests/benchmarks/logits.cpp); on the CPU, both round activations to eight
bits. Sizes are of the weights' files, as shares of four bytes per parameter. The importance matrix (`+imatrix`) is made
of the very texts that slmops calibrates on.

Prints a Markdown table as it grows; takes about half an hour on two idle cores, and ten minutes more the first time, in
which llama.cpp is built (tests/benchmarks/llama_cpp.py). `--plot` writes the divergences over the bytes of the first
checkpoint, and `--write` puts the tables into a page, between the lines of MARKS. `--work` keeps what was made and
measured with the same options, so that an interrupted run goes on where it stopped; only speeds are measured in each
run, so that they are of one hour. A speed with `?` was measured on a machine too busy to rely on.
"""

import argparse
import json
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from slmops.infra.genai.measurement import cpu_model
from slmops.infra.reference.answers import ANSWERS_FILE, LOGITS_FILE, SourceAnswers
from slmops.infra.reference.distributions import compare_position
from slmops.infra.settings import BenchmarkSettings, EvaluationSettings, MachineSettings, Settings
from slmops.tasks.build.recipes import known_recipes, load_recipe
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.environment.host import builder_versions
from slmops.tasks.exams.answers import evaluate_variant, run_reference
from slmops.tasks.exams.exam import Bench
from slmops.tasks.exams.measurement import measure_variant
from slmops.tasks.questions.evaluation_set import EvaluationRow, chat_prompts, read_evaluation_file
from tests.benchmarks.builds import Texts, build, calibration_texts, real_checkpoint
from tests.benchmarks.llama_cpp import LlamaCpp, peer

QUESTIONS_FILE = Path(__file__).with_name("fidelity_questions.jsonl")
MODELS = ("smollm2-off-grid", "gemma3-270m")
MODELS_ON_A_GRID = ("smollm2", "gemma3-270m")
PAGE_WIDTH = 120  # columns of a page
MARKS = ("<!-- begin: python -m tests.benchmarks.fidelity -->\n", "<!-- end -->\n")
RECIPES = ("int4-rtn", "int4", "int4-mixed", "int8")
ALL_RECIPES = tuple(name for precision in ("int4", "int8") for name in known_recipes(precision))
TYPES = ("Q4_0", "Q4_K_M", "Q4_K_M+imatrix", "Q5_K_M", "Q6_K", "Q8_0")
COLUMNS = (
    *("of", "variant", "build s", "MB", "of fp32", "KL, nats", "top-1", "score"),
    *("prompt tok/s", "new tok/s", "peak RSS MB"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


@dataclass(frozen=True)
class Speed:
    """What one process of its own did with 128 prompt and 64 new tokens: medians of its tokens/s, its peak memory."""

    prompt_tokens_per_s: float
    new_tokens_per_s: float
    peak_rss_bytes: float
    is_reliable: bool = True


@dataclass(frozen=True)
class Point:
    """A variant's bytes and figures, and the wall time of its build in s; what was not measured is None."""

    of: str
    variant: str
    size_bytes: int
    share: float
    kl_divergence: float
    top1_agreement: float
    score: float | None = None
    build_s: float | None = None

    def line(self, speed: Speed | None = None) -> str:
        """Return its line of the table."""
        score = "-" if self.score is None else f"{self.score:.2f}"
        build_s = "-" if self.build_s is None else f"{self.build_s:.0f}"
        told = "- | - | -"
        if speed:
            doubt = "" if speed.is_reliable else "?"
            told = f"{speed.prompt_tokens_per_s:.0f}{doubt} | {speed.new_tokens_per_s:.0f}{doubt}"
            told += f" | {speed.peak_rss_bytes / 1e6:.0f}"
        return (
            f"| {self.of} | `{self.variant}` | {build_s} | {self.size_bytes / 1e6:.1f} | {self.share:.3f} "
            f"| {self.kl_divergence:.4f} | {self.top1_agreement:.3f} | {score} | {told} |"
        )


@dataclass(frozen=True)
class Comparison:
    """A checkpoint, the rows that it answered, and where its answers and distributions are kept."""

    checkpoint: Path
    rows: Sequence[EvaluationRow]
    settings: Settings
    work: Path

    @property
    def reference(self) -> Path:
        """The folder of the checkpoint's own answers and logits."""
        return self.work / "reference"

    @property
    def fp32_bytes(self) -> int:
        """The size of the weights in fp32."""
        return 4 * inspect_checkpoint(self.checkpoint).parameters

    def run_source(self) -> None:
        """Let the checkpoint answer, unless it has."""
        if not (self.reference / ANSWERS_FILE).is_file():
            run_reference(self.settings, Bench(self.checkpoint, self.reference), self.rows)

    def kept(self, name: str, measured: Callable[[str], Point]) -> Point:
        """Return a variant's point, measured unless the folder of work has it."""
        file = self.work / f"{name}.point.json"
        if not file.exists():
            file.write_text(json.dumps(vars(measured(name))), "utf-8")
        return Point(**json.loads(file.read_bytes()))

    def speed(self, point: Point, llama: LlamaCpp | None) -> Speed:
        """Measure the speed of a variant whose files are in the folder of work."""
        if point.of == "llama.cpp" and llama:
            bench = llama.bench(self.work / f"{point.variant}.gguf", threads=self.settings.threads)
            return Speed(bench.prompt_tps, bench.generation_tps, bench.peak_rss_bytes)
        measured = measure_variant(self.settings, self._bench(point.variant))
        return Speed(
            measured.metrics["prompt_processing_throughput_tps"],
            measured.metrics["token_generation_throughput_tps"],
            measured.metrics["peak_rss_bytes"],
            measured.reliable,
        )

    def _bench(self, name: str) -> Bench:
        return Bench(self.work / name / "model", self.work / name / "bench")

    def of_slmops(self, name: str) -> Point:
        """Build a recipe and return its point."""
        folder = self.work / name
        built = folder / "built"  # how long it took, in s
        if not built.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
            build_s = build(load_recipe(name), self.checkpoint, folder, self.settings.threads, self._texts())
            built.write_text(f"{build_s:.1f}", "utf-8")
        found = evaluate_variant(self.settings, self._bench(name), self.rows, reference_dir=self.reference)
        assert found.kl_divergence is not None
        assert found.top1_agreement is not None
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.onnx*"))
        return Point(
            of="slmops",
            variant=name,
            size_bytes=size,
            share=size / self.fp32_bytes,
            kl_divergence=found.kl_divergence,
            top1_agreement=found.top1_agreement,
            score=found.score.value if found.score else None,
            build_s=float(built.read_text("utf-8")),
        )

    def _texts(self) -> Texts:
        """Return the texts that a deploy calibrates on, made once."""
        file = self.work / "calibration.json"
        if not file.exists():
            texts = calibration_texts(self.checkpoint, self.work, self.settings.threads)
            file.write_text(json.dumps(texts), "utf-8")
        return tuple(tuple(row) for row in json.loads(file.read_bytes()))

    def of_llama_cpp(self, llama: LlamaCpp, name: str) -> Point:
        """Convert the checkpoint, quantize it to a type, and return its point."""
        whole, file = self.work / "f16.gguf", self.work / f"{name}.gguf"
        if not whole.exists():
            llama.convert(self.checkpoint, whole)
        type_name, _, with_matrix = name.partition("+")
        matrix = llama.importance(whole, self._calibration_file()) if with_matrix else None
        llama.quantize(whole, file, type_name, self.settings.threads, importance=matrix)
        divergence, agreement, score = self._fidelity_of_llama_cpp(llama, file)
        return Point(
            of="llama.cpp",
            variant=name,
            size_bytes=file.stat().st_size,
            share=file.stat().st_size / self.fp32_bytes,
            kl_divergence=divergence,
            top1_agreement=agreement,
            score=score,
        )

    def _calibration_file(self) -> Path:
        """Write the texts that slmops calibrates on as one text."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))
        texts = [tokenizer.decode(list(row), skip_special_tokens=False) for row in self._texts()]
        file = self.work / "calibration.txt"
        file.write_text("\n".join(texts), "utf-8")
        return file

    def _fidelity_of_llama_cpp(self, llama: LlamaCpp, gguf: Path) -> tuple[float, float, float]:
        """Return the mean KL divergence, the top-1 agreement and the score of a GGUF file in llama.cpp."""
        answers = SourceAnswers.model_validate_json((self.reference / ANSWERS_FILE).read_bytes())
        expected = iter(np.load(self.reference / LOGITS_FILE, mmap_mode="r"))
        judged = [row for row in answers.rows if row.positions]
        ids, first = [row.prompt_ids + row.answer_ids for row in judged], [min(row.positions) for row in judged]
        threads = self.settings.threads
        found = llama.logits(gguf, [row[:-1] for row in ids], first, threads)
        compared = [
            compare_position(next(expected), logits[at - start], row_ids[at + 1])
            for row, row_ids, start, logits in zip(judged, ids, first, found, strict=True)
            for at in row.positions
        ]
        divergence = sum(position.kl_divergence or 0.0 for position in compared) / len(compared)
        agreement = sum(position.agrees for position in compared) / len(compared)
        return divergence, agreement, self._score_of_llama_cpp(llama, gguf, answers)

    def _score_of_llama_cpp(self, llama: LlamaCpp, gguf: Path, answers: SourceAnswers) -> float:
        """Return the mean score of the greedy answers to the rows that expect one."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))
        prompts = {row.id: row.prompt_ids for row in answers.rows}
        scored = [row for row in self.rows if row.expected is not None]
        asked = [prompts[row.id] for row in scored]
        found = llama.answers(gguf, asked, self.settings.evaluation.max_new_tokens, self.settings.threads)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
        scores = [row.scorer.score(text, row.expected or "") for row, text in zip(scored, texts, strict=True)]
        return sum(scores) / len(scores)


def front_of(points: Sequence[Point]) -> list[Point]:
    """Return the points of which no other one is nearer to the checkpoint for at most as many bytes, by size."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.size_bytes, point.kl_divergence)):
        if not front or point.kl_divergence < front[-1].kl_divergence:
            front.append(point)
    return front


def draw(points: Sequence[Point], title: str, file: Path) -> None:
    """Write the divergences over the bytes: the front of slmops and that of llama.cpp."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for of, style in (("slmops", "o-"), ("llama.cpp", "s-")):
        front = front_of([point for point in points if point.of == of])
        if front:
            axes.plot([point.share for point in front], [point.kl_divergence for point in front], style, label=of)
        for point in front:
            place = (point.share, point.kl_divergence)
            # Names of one kind are to the left below, those of the other to the right above: many points lie close.
            offset, side = ((-5, -9), "right") if of == "slmops" else ((5, 4), "left")
            axes.annotate(point.variant, place, xytext=offset, ha=side, textcoords="offset points", fontsize=8)
    axes.set(xlabel="bytes, as a share of fp32", ylabel="mean KL divergence, nats", yscale="log", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file)


def measured(
    model: str, asked: argparse.Namespace, work: Path, llama: LlamaCpp | None
) -> list[tuple[Point, Speed | None]]:
    """Measure the variants of a checkpoint and print their table as it grows."""
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        home=work / "home",
        machine=MachineSettings(threads=asked.threads),
        benchmark=BenchmarkSettings(prompt_tokens=(128,), new_tokens=64),
        evaluation=EvaluationSettings(max_new_tokens=64, max_positions=asked.positions, batch_size=16),
    )
    rows = [*chat_prompts(), *read_evaluation_file(QUESTIONS_FILE)]
    compared = Comparison(real_checkpoint(model), rows, settings, work)
    compared.run_source()
    measures = dict.fromkeys(asked.recipes or (ALL_RECIPES if llama else RECIPES), compared.of_slmops)
    if llama:
        measures |= dict.fromkeys(asked.types, partial(compared.of_llama_cpp, llama))
    print(f"\n{model}\n\n{HEAD}", flush=True)
    points = []
    for variant, measure in measures.items():
        points.append(compared.kept(variant, measure))
        print(points[-1].line(), flush=True)
    if asked.without_speed:
        return [(point, None) for point in points]
    print("\nWith speeds, one after the other:\n", flush=True)
    timed: list[tuple[Point, Speed | None]] = []
    for point in points:
        timed.append((point, compared.speed(point, llama)))
        print(point.line(timed[-1][1]), flush=True)
    return timed


def written(page: str, told: str) -> str:
    """Return a page with other text between the lines of MARKS."""
    begin, end = MARKS
    before, rest = page.split(begin)
    return f"{before}{begin}\n{told}\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    names = "names of tests.support.real_models, or folders"
    parser.add_argument("--model", nargs="+", default=MODELS, help=names)
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--without-speed", action="store_true")
    parser.add_argument("--work", type=Path, help="a folder that keeps what is made; default: a temporary one")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a page, such as docs/recipes.md")
    asked = parser.parse_args()
    llama = None if asked.without_peer else peer()
    versions = [f"{name} {found}" for name, found in builder_versions().items()] + ([llama.version] if llama else [])
    machine = f"{datetime.now(UTC):%Y-%m-%d}, {cpu_model()}, {asked.threads} threads; {', '.join(versions)}."
    told = [textwrap.fill(machine, PAGE_WIDTH)]
    print(told[0])
    points = {}
    with tempfile.TemporaryDirectory() as name:
        for model in asked.model:
            work = (asked.work or Path(name)).absolute() / Path(model).name
            points[model] = measured(model, asked, work, None if model in MODELS_ON_A_GRID else llama)
            told.append(f"`{model}`:\n\n{HEAD}\n" + "\n".join(point.line(speed) for point, speed in points[model]))
    if asked.plot:
        draw([point for point, _ in points[asked.model[0]]], asked.model[0], asked.plot)
    if asked.json:
        found = {
            model: [vars(point) | {"speed": speed and vars(speed)} for point, speed in of_model]
            for model, of_model in points.items()
        }
        asked.json.write_text(json.dumps(found, indent=1), "utf-8")
    if asked.write:
        asked.write.write_text(written(asked.write.read_text("utf-8"), "\n\n".join(told) + "\n"), "utf-8")


if __name__ == "__main__":
    main()
