"""Load `slmops serve`: many short requests from several clients without pause.

Run as `python -m tests.benchmarks.serving [--requests 10000] [--clients 8] [--new-tokens 16] [--json FILE]`, on a
machine that does nothing else. The model is a random-weight Qwen2 of 0.1 M parameters in int4, built by the product's
own path, so that what is measured is the server, not the arithmetic.

Prints errors, requests/s, p50, p95 and the highest latency in ms, generated tokens/s in all and of one client alone
beside onnxruntime-genai's own in one process, and how the resident memory of server and runtime grew over the second
half of the requests, in bytes per request. Ends with status 1 if any request failed.
"""

import argparse
import itertools
import json
import platform
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from slmops.infra.genai.calls import Measure
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.genai_models import build_genai_model
from tests.support.served_models import RunningServer, serving, store_model

MESSAGES = [{"role": "user", "content": "turn on the kitchen light"}]
SAMPLE_INTERVAL_S = 0.5


class Load:
    """Clients that send requests without pause until a number is reached."""

    def __init__(self, server: RunningServer, requests: int, new_tokens: int) -> None:
        self.latencies_ms: list[float] = []
        self.tokens = 0
        self.prompt_tokens = 0
        self.errors: list[str] = []
        self._url = f"{server.url}/v1/chat/completions"
        self._numbers = itertools.count()
        self._requests = requests
        self._body = {"model": "home", "messages": MESSAGES, "max_tokens": new_tokens, "temperature": 0}

    def run(self, clients: int) -> float:
        """Ask; returns the wall time in s."""
        threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started

    def _ask(self) -> None:
        with httpx.Client(timeout=120) as client:
            while next(self._numbers) < self._requests:
                started = time.perf_counter()
                try:
                    answer = client.post(self._url, json=self._body)
                    usage = answer.raise_for_status().json()["usage"]
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    self.errors.append(repr(error))
                    continue
                self.latencies_ms.append(1000 * (time.perf_counter() - started))
                self.tokens += usage["completion_tokens"]
                self.prompt_tokens = usage["prompt_tokens"]


class Memory(threading.Thread):
    """Samples of (requests done, resident memory of server and runtime in bytes)."""

    def __init__(self, server: RunningServer, load: Load) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[int, int]] = []
        self.ended = threading.Event()
        self._processes = [psutil.Process(pid) for pid in (server.process.pid, *server.runtimes())]
        self._load = load

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_INTERVAL_S):
            rss_bytes = sum(process.memory_info().rss for process in self._processes)
            self.samples.append((len(self._load.latencies_ms), rss_bytes))

    def growth_bytes_per_request(self) -> float:
        """Slope over the second half: the first one fills caches."""
        half = [sample for sample in self.samples if sample[0] >= self.samples[-1][0] / 2]
        requests, rss_bytes = np.array(half, dtype=float).T
        return float(np.polyfit(requests, rss_bytes, 1)[0]) if len(half) > 2 else float("nan")


def measure(folder: Path, requests: int, clients: int, new_tokens: int) -> dict[str, Any]:
    """Return all figures."""
    checkpoint = make_tiny_checkpoint(folder / "checkpoint")
    model_dir = build_genai_model(checkpoint, folder / "model", "int4")
    store_model(ModelRegistry(LocalObjectStore(folder / "home/store")), model_dir, folder / "in")
    with serving(folder / "home", "home") as server:
        Load(server, 50, new_tokens).run(1)
        alone = Load(server, max(50, requests // 50), new_tokens)
        alone_s = alone.run(1)
        load = Load(server, requests, new_tokens)
        memory = Memory(server, load)
        memory.start()
        wall_s = load.run(clients)
        memory.ended.set()
        memory.join()
    latencies_ms = np.array(load.latencies_ms or [float("nan")])
    return {
        "requests": requests,
        "clients": clients,
        "errors": len(load.errors),
        "first_error": next(iter(load.errors), None),
        "requests_per_s": len(load.latencies_ms) / wall_s,
        "p50_ms": float(np.percentile(latencies_ms, 50)),
        "p95_ms": float(np.percentile(latencies_ms, 95)),
        "highest_ms": float(latencies_ms.max()),
        "tokens_per_s": load.tokens / wall_s,
        "tokens_per_s_of_one_client": alone.tokens / alone_s,
        "genai_tokens_per_s": in_process(model_dir, folder, load.prompt_tokens, new_tokens),
        "rss_bytes": memory.samples[-1][1],
        "growth_bytes_per_request": memory.growth_bytes_per_request(),
    }


def in_process(model_dir: Path, folder: Path, prompt_tokens: int, new_tokens: int) -> float:
    """Return tokens/s of the same requests, prompt included, one after the other in genai itself."""
    request = {
        "model_dir": str(model_dir),
        "prompt_tokens": [prompt_tokens],
        "new_tokens": new_tokens,
        "warmup": 20,
        "repetitions": 200,
        "threads": psutil.cpu_count(logical=False) or 1,
        "sweep": None,
    }
    child = run_in_child(
        Measure(**request),
        deadline_s=600,
        log_path=folder / "measure.log",
        work_dir=folder / "work",
    )
    latencies_ms = [row.e2e_latency_ms for row in child.value.rows]
    return 1000 * new_tokens / float(np.median(latencies_ms))


def main() -> int:
    """Print the figures; 0 when no request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slmops-serving-") as name:
        figures = measure(Path(name), arguments.requests, arguments.clients, arguments.new_tokens)
    versions = {
        package: version(package)
        for package in ("foundry-local-sdk", "onnxruntime-genai", "uvicorn", "starlette", "httpx")
    }
    print(f"{datetime.now(UTC):%Y-%m-%d}; {psutil.cpu_count()} cores; Python {platform.python_version()}; {versions}\n")
    for key, value in figures.items():
        print(f"{key:28}{value:>14,.1f}" if isinstance(value, float) else f"{key:28}{value!s:>14}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "versions": versions}, indent=2) + "\n")
    return 1 if figures["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
