"""The house stays in order: what tests/counts.py counts does not grow."""

from tests.counts import counts


def test_no_count_is_above_its_limit() -> None:
    assert [count for count in counts() if count.found > count.limit] == []
