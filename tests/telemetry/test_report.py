"""Counts of rows: a tuple, which with one row converts to a number."""

import pytest

from transformers_resps.telemetry import RowCounts


def test_the_count_of_one_row_converts_to_an_integer_and_equals_none() -> None:
    """What is equal has one hash: `count == 3` beside `count not in {3}` would break sets and dicts."""
    count = RowCounts([3])
    assert int(count) == 3 and count[0] == 3 and count.to_json() == 3
    assert count == (3,) and hash(count) == hash((3,))
    assert count != 3 and count not in {3}
    with pytest.raises(TypeError):
        assert count < 4


def test_counts_of_several_rows_are_a_tuple_and_equal_no_integer() -> None:
    counts = RowCounts([3, 0])
    assert counts == (3, 0) and counts != 3 and counts[0] == 3 and sum(counts) == 3
    assert counts.to_json() == [3, 0]
    with pytest.raises(ValueError, match=r"\(3, 0\) counts 2 rows\. Take one of them by its index, or their sum\."):
        int(counts)
