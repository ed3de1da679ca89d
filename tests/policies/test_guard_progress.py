"""A call is as far as its slowest row, which may have had some bad luck."""

import pytest

from transformers_resps.policies.guard import RowProgress
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import TreeShape


def step(*emitted: int) -> StepRecord:
    accepted = RowCounts(max(count - 1, 0) for count in emitted)
    return StepRecord(TreeShape.plain(), 0, 1, accepted, RowCounts(emitted), 0.0, 1.0, 1.0)


def test_one_row_advances_by_its_tokens() -> None:
    progress = RowProgress()
    assert [progress.add(step(count)) for count in (1, 4, 2)] == [1, 4, 2]


def test_a_lag_of_a_few_tokens_counts_as_bad_luck_and_more_as_slower() -> None:
    progress = RowProgress()
    assert progress.add(step(1, 5)) == 3.0, "the mean"
    assert progress.add(step(1, 5)) == pytest.approx(1.0), "4 tokens: the slowest row's 2, and 2"
    assert progress.add(step(1, 5)) == pytest.approx(1.0)


def test_finished_rows_do_not_count() -> None:
    progress = RowProgress()
    progress.add(step(1, 1))
    assert progress.add(step(3, 0)) == 3 and len(progress.written) == 2


def test_a_new_call_starts_at_nothing() -> None:
    progress = RowProgress()
    progress.add(step(1, 9))
    progress.begin_call()
    assert progress.written == [] and progress.add(step(1, 1)) == 1
