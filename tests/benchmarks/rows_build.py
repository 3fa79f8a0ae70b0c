"""Rows about builds: wall time, memory, and the bytes that they read and write."""

from collections.abc import Iterator
from dataclasses import asdict

import psutil

from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.environment.estimates import estimate_build_ram
from tests.benchmarks.bench import PRECISIONS, Bench, NotMeasured, Row, row_below, row_beside, torch_pid
from tests.benchmarks.random_checkpoint import SHAPES, write_random_checkpoint
from tests.benchmarks.stock_olive import build_by_stock_olive
from tests.benchmarks.watching import FolderSize, bytes_moved, folder_bytes, forget_cached

# Olive's own way with onnxruntime-genai 0.14.1, as it was measured once on two cores with the reference shape: a cached
# fp32 build, then int4, an fp16 pass and a dynamic int8 pass (33 + 47 + 74 + 83 s; 10.9 GB). It wants another version
# of the builder than slmops has, and is run only where that is asked for.
STOCK_OLIVE_S = 237.0
STOCK_OLIVE = "stock Olive, recorded"
GB = 1e9
MOST_BUILD_GB = {"int4": 2.5, "int8": 2.5}


def build_wall(bench: Bench) -> Iterator[Row]:
    """All variants of the reference model in one process, its start included."""
    built, wall_s = bench.builds
    each = {precision: round(build.wall_s, 2) for precision, build in built.items()}
    what = "build fp16 + int8 + int4, wall"
    if bench.with_stock:
        stock = build_by_stock_olive(bench.checkpoint, bench.folder / "stock", bench.say)
        stock_s, stock_name = sum(build.seconds for build in stock.values()), "stock Olive"
        of_stock = {precision: asdict(one) | {"output": None} for precision, one in stock.items()}
    else:
        stock_s, stock_name, of_stock = STOCK_OLIVE_S, STOCK_OLIVE, {}
    if bench.with_stock or not bench.tiny:  # what was recorded is of the reference shape
        yield row_beside(
            "build",
            what,
            wall_s,
            "s",
            peer=stock_s,
            peer_name=stock_name,
            at_most=0.3,
            wall_s_of=each,
            peer_of=of_stock,
        )
    peer = bench.peer_files
    yield row_beside(
        "build",
        what,
        wall_s,
        "s",
        peer=peer.wall_s if peer else None,
        peer_name="llama.cpp convert + Q8_0 + Q4_0",
        at_most=2.0,
        wall_s_of=each,
        peer_wall_s_of={name: round(step.seconds, 2) for name, step in peer.steps.items()} if peer else {},
        size_bytes_of={precision: build.size_bytes for precision, build in built.items()},
        peer_size_bytes_of={name: path.stat().st_size for name, path in peer.files.items()} if peer else {},
    )


def build_memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of each build, in the process that builds all variants, including memory that earlier builds left."""
    built, peer = bench.builds[0], bench.peer_files
    for precision, peer_type in {"int4": "Q4_0", "int8": "Q8_0", "fp16": "f16"}.items():
        build = built[precision]
        peer_bytes = max(peer.steps[step].peak_rss_bytes for step in ("f16", peer_type)) if peer else None
        measured, limit = build.peak_rss_bytes / GB, MOST_BUILD_GB.get(precision)
        yield Row(
            key="build-memory",
            what=f"peak RSS of building {precision}",
            measured=measured,
            unit="GB",
            target=f"at most {limit} GB" if limit else "",
            met=measured <= limit if limit else None,
            peer=peer_bytes / GB if peer_bytes else None,
            peer_name="llama.cpp convert and quantize",
            ratio=build.peak_rss_bytes / peer_bytes if peer_bytes else None,
        )


def build_bytes(bench: Bench) -> Iterator[Row]:
    """What the builds of all variants fetch from the disk and write, after a build that has done the imports.

    Before the first the checkpoint is dropped from the page cache, as it is when a run begins: what of it a build has
    to fetch is counted, mapped into memory or not. On a machine whose memory does not hold the checkpoint, later
    builds would fetch it again.
    """
    checkpoint, source_bytes = bench.checkpoint, bench.source_bytes
    warm = write_random_checkpoint(bench.folder / "warm", SHAPES["tiny"])
    read = written = by_calls = output = 0
    temporary: dict[str, float] = {}
    details = {}
    with bench.torch_process() as child:
        for precision in PRECISIONS:
            bench.build(child, warm, precision, bench.folder / "warm-builds")
        forget_cached(checkpoint)
        for precision in PRECISIONS:
            into = bench.folder / "counted"
            with bytes_moved(torch_pid()) as moved, FolderSize(into / precision) as largest:
                build = bench.build(child, checkpoint, precision, into)
            read += moved.read
            written += moved.written
            by_calls += moved.written_by_calls
            output += build.size_bytes
            left_over = folder_bytes(into / precision) - build.size_bytes
            temporary[precision] = (largest.peak_bytes - build.size_bytes) / build.size_bytes
            details[precision] = {
                "read_bytes": moved.read,
                "written_bytes": moved.written,
                "written_by_calls_bytes": moved.written_by_calls,
                "largest_sum_of_files_bytes": largest.peak_bytes,
                "output_bytes": build.size_bytes,
                "left_over_bytes": left_over,
            }
    yield row_beside(
        "bytes",
        "read from the disk by 3 builds",
        read / GB,
        "GB",
        peer=source_bytes / GB,
        peer_name="the source",
        at_most=1.05,
        of=details,
    )
    yield row_beside(
        "bytes",
        "written by 3 builds",
        max(written, by_calls) / GB,
        "GB",
        peer=output / GB,
        peer_name="the outputs",
    )
    worst = max(temporary, key=lambda precision: temporary[precision])
    yield row_below(
        "bytes",
        f"largest temporary files of a build ({worst}), over its output",
        temporary[worst],
        "times",
        1.0,
        of=temporary,
    )


def build_3b(bench: Bench) -> Iterator[Row]:
    """Memory of building int4 of a sharded 3 B shape."""
    bench.say("writing a sharded 3 B checkpoint")
    name, shard_bytes = ("tiny", 100_000) if bench.tiny else ("qwen2.5-3b", 2_000_000_000)
    checkpoint = write_random_checkpoint(bench.folder / "sharded", SHAPES[name], shard_bytes=shard_bytes)
    shards = sorted(checkpoint.glob("*.safetensors"))
    needed, available = estimate_build_ram(inspect_checkpoint(checkpoint), "int4"), psutil.virtual_memory().available
    if needed > available and not bench.tiny:  # the system would end other processes for it
        raise NotMeasured(f"it needs {needed / GB:.1f} GB by slmops' estimate; {available / GB:.1f} GB are free")
    with bench.torch_process() as child:
        build = bench.build(child, checkpoint, "int4", bench.folder / "sharded-builds")
    for path in shards:  # 6 GB that nothing else needs
        path.unlink()
    yield row_below(
        "build-3b",
        f"peak RSS of building int4 of {'a tiny model' if bench.tiny else '3 B'}, {len(shards)} shards",
        build.peak_rss_bytes / GB,
        "GB",
        6.0,
        wall_s=build.wall_s,
        size_bytes=build.size_bytes,
    )
