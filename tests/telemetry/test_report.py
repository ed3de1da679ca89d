"""Counts of rows: a tuple; that of one row converts to a number."""

import pytest

from transformers_resps.telemetry import RowCounts


def test_the_count_of_one_row_converts_to_a_number_and_equals_what_it_hashes_like() -> None:
    count = RowCounts([3])
    assert int(count) == count[0] == count.to_json() == 3
    assert count == (3,) and count in {(3,)}
    assert count != 3 and count not in {3}


def test_counts_of_several_rows_are_no_number() -> None:
    counts = RowCounts([3, 0])
    assert counts == (3, 0) and counts[0] == 3 and sum(counts) == 3
    assert counts.to_json() == [3, 0]
    with pytest.raises(ValueError, match=r"\(3, 0\) counts 2 rows\. Take one of them by its index, or their sum\."):
        int(counts)
