"""Rows about transfers beside rclone, and about several clients of one served model."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx

from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from tests.benchmarks.bench import ROOT, Bench, NotMeasured, Row, command_environment, row_beside
from tests.benchmarks.serving import Load
from tests.support.packages import RealModelMissing
from tests.support.real_models import real_model
from tests.support.s3_servers import rclone_binary
from tests.support.served_models import RunningServer, serving, store_model

CLIENTS = 8
NEW_TOKENS = 32
SENTENCE = "Answer in one short sentence. "
SENTENCES, OF_TINY = 170, 4  # 170 are about 1,000 tokens


def transfer(bench: Bench) -> Iterator[Row]:
    """Push to and pull from S3 beside `rclone copy`; tests/benchmarks/transfer.py says how."""
    try:
        rclone_binary()
    except Exception as error:
        raise NotMeasured(f"there is no rclone: {error}") from error
    bench.say("pushing and pulling beside rclone")
    report = bench.folder / "transfer.json"
    size = ["--rounds", "1", "--scale", "0.01"] if bench.tiny else ["--rounds", "3"]
    command = [sys.executable, "-m", "tests.benchmarks.transfer", *size, "--json", str(report)]
    command += ["--work", str(bench.folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=command_environment(), capture_output=True, text=True, check=False
    )  # it fails for a missed target
    if not report.is_file():
        raise RuntimeError(done.stderr[-2000:])
    judged = json.loads(report.read_text("utf-8"))
    for direction, seconds in judged["median_s"].items():
        speeds = {name: judged["size_bytes"] / 1e6 / took for name, took in seconds.items()}
        yield row_beside(
            "transfer",
            f"{direction} with S3",
            speeds["slmops"],
            "MB/s",
            peer=speeds["rclone"],
            peer_name="rclone copy",
            at_least=1.0,
        )


def clients(bench: Bench) -> Iterator[Row]:
    """Eight clients of a served int4 model beside one, and eight with the same long system prompt."""
    try:
        checkpoint = bench.checkpoint if bench.tiny else real_model("smollm2")
    except RealModelMissing as error:
        raise NotMeasured(str(error)) from error
    with bench.torch_process() as child:
        model = bench.build(child, checkpoint, "int4", bench.folder / "served")
    home = bench.folder / "clients-home"
    store_model(ModelRegistry(LocalObjectStore(home / "store")), model.folder, bench.folder / "served-in")
    with serving(home, "home") as server:
        speeds = {}
        for count in (1, CLIENTS):
            bench.say(f"{count} clients of a server")
            speeds[count] = _tokens_per_s(server, count)
        yield row_beside(
            "clients",
            f"{CLIENTS} clients of a server, int4",
            speeds[CLIENTS],
            "tok/s",
            peer=speeds[1],
            peer_name="one client",
            at_least=2.5,
        )
        bench.say("eight clients with one system prompt")
        first_s = times_to_first_token(server, SENTENCE * (OF_TINY if bench.tiny else SENTENCES))
        yield row_beside(
            "clients",
            f"TTFT of the last of {CLIENTS} with one system prompt of 1,000 tokens",
            max(first_s),
            "s",
            peer=min(first_s),
            peer_name="the first's",
            at_most=1.5,
        )


def _tokens_per_s(server: RunningServer, count: int) -> float:
    Load(server, 1, NEW_TOKENS).run(1)
    load = Load(server, 3 * CLIENTS, NEW_TOKENS)
    seconds = load.run(count)
    if load.errors:
        raise RuntimeError(load.errors[0])
    return load.tokens / seconds


def times_to_first_token(server: RunningServer, system_prompt: str) -> list[float]:
    """Return the s until the first text of each of eight answers that are asked for at once."""
    found: list[float] = []
    begin = threading.Barrier(CLIENTS)

    def ask(number: int) -> None:
        question = {"role": "user", "content": f"What is {number} and one?"}
        messages = [{"role": "system", "content": system_prompt}, question]
        body = {"model": "home", "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
        begin.wait()
        started = time.perf_counter()
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=600) as answer:
            for line in answer.raise_for_status().iter_lines():
                if '"content":"' in line.replace(" ", "") and '"content":""' not in line.replace(" ", ""):
                    found.append(time.perf_counter() - started)
                    return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) < CLIENTS:
        raise RuntimeError(f"{CLIENTS - len(found)} of {CLIENTS} clients got no text.")
    return found
