"""Counts of rows: a tuple; that of one row converts to a number. What a server tells of a request."""

import pytest

from transformers_resps import TreeShape
from transformers_resps.telemetry import RowCounts
from transformers_resps.telemetry.report import SpeculationReport, StepRecord


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


def step(verified: int, accepted: int) -> StepRecord:
    counts = RowCounts([accepted]), RowCounts([accepted + 1])
    return StepRecord(TreeShape(verified, 1, 1), verified, verified, *counts, 0.0, 0.0, 0.0)


def test_a_server_tells_of_a_request_what_vllm_does() -> None:
    report = SpeculationReport(steps=[step(1, 0), step(8, 2), step(4, 0), step(1, 0)])
    assert report.acceptance() == {
        "num_target_forwards": 4,
        "mean_tokens_per_forward": 6 / 4,
        "num_spec_steps": 3,
        "num_draft_tokens": 7 + 3,
        "num_accepted_draft_tokens": 2,
        "mean_acceptance_length": 1 + 2 / 3,
        "draft_acceptance_rate": 2 / 10,
        "acceptance_histogram": [2, 0, 1],
    }


def test_a_request_of_one_token_has_no_drafts_to_tell_of() -> None:
    told = SpeculationReport(steps=[step(1, 0)]).acceptance()
    assert told["num_spec_steps"] == told["num_draft_tokens"] == told["draft_acceptance_rate"] == 0
    assert told["mean_acceptance_length"] == 1 and told["acceptance_histogram"] == [0]
