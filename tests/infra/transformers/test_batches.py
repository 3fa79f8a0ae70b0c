"""How rows are put together that a source checkpoint answers at once."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.transformers.answers import MAX_BATCH_TOKENS, MIN_BATCH_ROWS, batches_of


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 64))
def test_every_row_is_in_one_batch_and_a_batch_of_long_rows_is_small(lengths: list[int], size: int) -> None:
    lengths.sort()
    order = [*reversed(range(len(lengths)))]
    batches = [*batches_of(order, lengths, size)]
    assert [index for batch in batches for index in batch] == order
    for batch in batches:
        assert 1 <= len(batch) <= size
        longest = lengths[order.index(batch[-1])]
        assert len(batch) <= MIN_BATCH_ROWS or len(batch) * longest <= MAX_BATCH_TOKENS
    for batch, following in itertools.pairwise(batches):
        longest = lengths[order.index(following[0])]
        assert len(batch) == size or (len(batch) >= MIN_BATCH_ROWS and (len(batch) + 1) * longest > MAX_BATCH_TOKENS)
