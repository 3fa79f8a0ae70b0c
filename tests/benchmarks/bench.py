"""Shared parts of the rows of tests/benchmarks/targets.py: a row's form, and the checkpoint and builds."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from slmops.infra.olive import calls
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import BenchmarkSettings, MachineSettings, Settings
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.recipes import load_recipe
from slmops.tasks.workshop import torch_process
from tests.benchmarks.llama_cpp import LlamaCpp
from tests.benchmarks.random_checkpoint import SHAPES, write_random_checkpoint
from tests.benchmarks.watching import Watched, folder_bytes

PRECISIONS = ("fp16", "int8", "int4")
THREADS = 2
PROMPT_TOKENS, NEW_TOKENS = 128, 64
UNCALIBRATED = {"int4": "int4-rtn"}  # its default recipe asks the checkpoint for answers first
DEADLINE_S = 3600.0
ROOT = Path(__file__).resolve().parents[2]


class NotMeasured(Exception):
    """A row that this machine cannot measure, and why."""


@dataclass(frozen=True)
class Row:
    """One figure, and its peer and target.

    `measured` and `peer` are in `unit`. `ratio` is measured over whatever the target is a share or a multiple of.
    `met` is None where nothing decides it: no target, or no peer in this run.
    """

    key: str
    what: str
    measured: float
    unit: str
    target: str
    met: bool | None
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def row_beside(
    key: str,
    what: str,
    measured: float,
    unit: str,
    *,
    peer: float | None,
    peer_name: str,
    at_least: float | None = None,
    at_most: float | None = None,
    **details: Any,
) -> Row:
    """Return a row that is compared with the peer's figure; its target, if any, is a multiple of that."""
    ratio = measured / peer if peer else None
    target, met = "", None
    if at_most is not None:
        target, met = f"at most {at_most:g} times", ratio is not None and ratio <= at_most
    elif at_least is not None:
        target, met = f"at least {at_least:g} times", ratio is not None and ratio >= at_least
    return Row(
        key=key,
        what=what,
        measured=measured,
        unit=unit,
        target=target,
        met=None if ratio is None else met,
        peer=peer,
        peer_name=peer_name,
        ratio=ratio,
        details=details,
    )


def row_below(
    key: str, what: str, measured: float, unit: str, limit: float, target: str | None = None, **details: Any
) -> Row:
    """Return a row whose target is a limit in the same unit; `target` describes it if it has several numbers."""
    return Row(
        key=key,
        what=what,
        measured=measured,
        unit=unit,
        target=target or f"at most {limit:g} {unit}",
        met=measured <= limit,
        ratio=measured / limit if limit else None,
        details=details,
    )


@dataclass(frozen=True)
class Build:
    """A built variant: wall of its call in s, peak memory of the process so far in bytes."""

    folder: Path
    wall_s: float
    peak_rss_bytes: int

    @property
    def size_bytes(self) -> int:
        """Size of the finished folder."""
        return folder_bytes(self.folder)


@dataclass(frozen=True)
class PeerFiles:
    """llama.cpp's files of the checkpoint, by type."""

    files: dict[str, Path]
    steps: dict[str, Watched]

    @property
    def wall_s(self) -> float:
        """All steps together."""
        return sum(step.seconds for step in self.steps.values())


class Bench:
    """One run of the benchmarks: its folder, its size, its peer, and builds that rows share."""

    def __init__(
        self, folder: Path, *, tiny: bool, peer: LlamaCpp | None, say: Callable[[str], None], with_stock: bool = False
    ) -> None:
        self.folder = folder
        self.tiny = tiny
        self.peer = peer
        self.with_stock = with_stock
        self.say = say

    @property
    def settings(self) -> Settings:
        """slmops' settings, in a home of the run's own."""
        return Settings(
            home=self.folder / "home",
            machine=MachineSettings(threads=THREADS),
            benchmark=BenchmarkSettings(prompt_tokens=(PROMPT_TOKENS,), new_tokens=NEW_TOKENS),
        )

    @cached_property
    def checkpoint(self) -> Path:
        """The reference model."""
        self.say("writing the reference checkpoint")
        return write_random_checkpoint(self.folder / "checkpoint", SHAPES["tiny" if self.tiny else "qwen2.5-0.5b"])

    @cached_property
    def source_bytes(self) -> int:
        """Size of the reference model's weights."""
        return sum(path.stat().st_size for path in self.checkpoint.glob("*.safetensors"))

    @cached_property
    def builds(self) -> tuple[dict[str, Build], float]:
        """The variants of the reference model, and the wall of all of them together with the process's start, in s."""
        checkpoint = self.checkpoint
        started = time.perf_counter()
        with self.torch_process() as child:
            built = {
                precision: self.build(child, checkpoint, precision, self.folder / "builds") for precision in PRECISIONS
            }
        return built, time.perf_counter() - started

    @cached_property
    def peer_files(self) -> PeerFiles | None:
        """llama.cpp's files of the reference model; None without the peer."""
        if self.peer is None:
            return None
        checkpoint, folder = self.checkpoint, self.folder / "gguf"
        folder.mkdir()
        files = {name: folder / f"{name}.gguf" for name in ("f16", "Q8_0", "Q4_0")}
        self.say("llama.cpp: converting to f16")
        steps = {"f16": self.peer.convert(checkpoint, files["f16"])}
        for name in ("Q8_0", "Q4_0"):
            self.say(f"llama.cpp: {name}")
            steps[name] = self.peer.quantize(files["f16"], files[name], name, THREADS)
        return PeerFiles(files, steps)

    @cached_property
    def fast_build(self) -> Build:
        """The reference model by the recipe int4-fast."""
        with self.torch_process() as child:
            return self.build(child, self.checkpoint, "int4", self.folder / "fast", recipe="int4-fast")

    def torch_process(self) -> ChildProcess:
        """Return the kind of process in which slmops builds all variants of a deploy."""
        return torch_process(self.settings)

    def build(
        self, child: ChildProcess, checkpoint: Path, precision: str, into: Path, *, recipe: str | None = None
    ) -> Build:
        """Build a variant, by a recipe or the one that needs no calibration, into a folder of `into`."""
        self.say(f"building {precision} of {checkpoint.name}")
        result = child.run(
            calls.Build(
                olive_config=olive_run_config(load_recipe(recipe or UNCALIBRATED.get(precision, precision))),
                checkpoint_dir=checkpoint,
                output_dir=into / precision / "model",
                cache_dir=into / precision / "cache",
                threads=THREADS,
            ),
            deadline_s=DEADLINE_S,
            log_path=into / f"{precision}.log",
            work_dir=into / precision,
        )
        return Build(into / precision / "model", result.wall_s, result.peak_rss_bytes)


def torch_pid() -> int:
    """Return the process that builds now."""
    for process in psutil.Process().children():
        if "slmops.infra.process.child" in process.cmdline():
            return process.pid
    raise RuntimeError("No process builds now.")


def command_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a command: this process's own, without settings of slmops' or Prefect's, and these.

    A command keeps what Python compiles, as an installed one does: compiling slmops takes 0.25 s of each process.
    """
    left_out = ("SLMOPS_", "PREFECT_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, **variables}
