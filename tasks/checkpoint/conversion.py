"""Conversion of checkpoints by child processes: each result is made once per key, and kept in the cache."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slmops.infra.process.call import Call, OnProgress
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import link_or_copy, made_once


def converted_once(
    key: str,
    call_into: Callable[[Path], Call[Any]],
    settings: Settings,
    on_progress: OnProgress | None = None,
    *,
    log_name: str,
    beside: Sequence[Path] = (),
) -> Path:
    """Return the folder of a checkpoint that a child process made, now or earlier for the same key.

    `call_into` returns the call that writes into a folder; the files `beside` the original are put into it too.
    `key` is the digest of everything that determines the result. Raises as `run_in_child` does, and leaves nothing.
    """
    converted = settings.cache_dir / "checkpoints" / key
    with made_once(converted, settings, on_progress) as made:
        if made:
            run_in_child(
                call_into(made),
                deadline_s=settings.timeout.merge_s,
                log_path=settings.cache_dir / "logs" / f"{log_name}-{key[:12]}.log",
                work_dir=made.parent,
                on_progress=on_progress,
            )
            for path in beside:
                link_or_copy(path, made / path.name)
    return converted
