"""The house stays in order: what tests/counts.py counts does not grow."""

import pytest

from tests.counts import Count, counts


@pytest.mark.parametrize("count", counts(), ids=lambda count: count.what)
def test_it_is_within_its_limit(count: Count) -> None:
    assert count.found <= count.limit, "\n".join(count.where)
