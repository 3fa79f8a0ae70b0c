"""Two batches at a time: a model's small steps keep two threads that share each of them waiting for each other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

LANES = 2  # each has a cache of keys and values
# Their rotary embedding is changed by a long text, so that a batch beside it would be computed with another one's.
CHANGING_ROPES = ("dynamic", "longrope")


def lanes_of(model: Any) -> int:
    """Return how many batches a model can be run on at a time: two with two threads or more, else one."""
    import torch

    ropes = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())
    keeps_rope = not any(name in ropes for name in CHANGING_ROPES)
    return LANES if keeps_rope and torch.get_num_threads() >= LANES else 1


def in_lanes(model: Any, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield the results of a model's work on each item, in order, `lanes_of` items at a time."""
    lanes = min(lanes_of(model), len(items))
    return map(work, items) if lanes < LANES else in_threads(lanes, work, items)


def in_threads(number: int, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results of a work on each item, in order, by this many threads, each with its share of torch's."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(threads // number)
    try:
        with ThreadPoolExecutor(number) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(threads)
