"""Cost tables: interpolated, kept as JSON, and refused where they hold anything but sizes and seconds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_resps.policies.costs import CostTable
from transformers_resps.tree import TreeShape


NO_TIMES = 0.0, -1.0, float("nan"), float("inf")


def test_a_table_without_ranges_and_start_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"verify": {"9": {"1": 0.5}}, "draft": {}, "identity": {}}))
    table = CostTable.load(path)
    assert table.verify == {9: {1: 0.5}} and table.verify_range == table.plain_range == table.draft_start == {}
    assert CostTable(table.verify, {2: 0.1}, {}).draft_seconds(2, 3) == pytest.approx(0.3)
    path.write_text(json.dumps({"verify": {"9": {"1": 0.5}}, "draft": {}, "identity": {}, "plain_range": {"9": [1]}}))
    with pytest.raises(ValueError, match="Delete it and run"):
        CostTable.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "not json",
        "[" * 10**5,
        '{"verify": {"9": {"1": 1e999}}, "draft": {}, "identity": {}}',
        json.dumps({"verify": {"9": {"1": 0.0}}, "draft": {}, "identity": {}}),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"Delete it and run|and run `calibrate"):
        CostTable.load(path)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=r"cost table .* cannot be read .*Check the path"):
            CostTable.load(path)


@pytest.mark.parametrize(
    "values",
    [
        ({"a": {1: 0.1}}, {}, {}),
        ({128: None}, {}, {}),
        ({128: {0: 0.1}}, {}, {}),
        ({0: {1: 0.1}}, {}, {}),
        ({-5: {1: 0.1}}, {}, {}),
        ({128: {1: True}}, {}, {}),
        ({128: {True: 0.1}}, {}, {}),
        ({128: {1: "a"}}, {}, {}),
        ({128: {1: 0.1}}, {0: 0.1}, {}),
        ({128: {1: 0.1}}, None, {}),
        (None, {}, {}),
        ({128: {1: 0.1}}, {}, None),
        ({128: {1: 0.1}}, {}, {}, float("inf")),
        ({128: {1: 0.1}}, {}, {}, "a"),
        ({128: {1: 0.1}}, {}, {}, -0.1),
        *(({9: {1: seconds}}, {}, {}) for seconds in NO_TIMES),
        *(({9: {1: 1.0}}, {1: seconds}, {}) for seconds in NO_TIMES),
    ],
    ids=str,
)
def test_a_table_of_other_things_than_sizes_and_seconds_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="sizes below 1 or costs that are no positive numbers.*Measure again with"):
        CostTable(*values)


def test_costs_that_fall_at_the_end_are_not_carried_on_below_the_last_one() -> None:
    falling = {1: 0.02, 24: 0.052, 32: 0.05}
    table = CostTable({128: falling, 768: falling | {32: 0.0499}}, {1: 0.003, 8: 0.002}, {})
    assert table.verify_seconds(200, 128) == table.verify_seconds(32, 128) == 0.05
    assert table.verify_seconds(32, 10**6) == 0.0499
    assert table.draft_seconds(40, 5) == pytest.approx(5 * 0.002)


def test_a_draft_costs_its_start_and_its_levels(tmp_path: Path) -> None:
    table = CostTable({9: {1: 1.0}}, {1: 0.1, 3: 0.0}, {}, draft_range={3: (0.0, 0.1)}, draft_start={1: 0.0, 3: 0.4})
    assert table.draft_seconds(1, 5) == pytest.approx(0.5)
    assert table.draft_seconds(3, 1) == table.draft_seconds(3, 5) == pytest.approx(0.4)
    assert table.draft_seconds(2, 3) == pytest.approx(0.2 + 3 * 0.05)
    assert table.draft_seconds(3, 0) == 0.0
    assert table.step_seconds(TreeShape(6, 5, 3), 9) == pytest.approx(1.4)
    assert table.step_seconds(TreeShape.plain(), 9) == 1.0
    table.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == table


@pytest.mark.parametrize(
    ("draft", "start"),
    [({1: 0.0}, {1: 0.0}), ({1: 0.1}, {1: -0.1}), ({1: 0.1}, {2: 0.1}), ({1: 0.1}, None), ({1: 0.1}, {1: "a"})],
)
def test_a_start_of_drafts_that_does_not_belong_to_their_levels_is_refused(draft: Any, start: Any) -> None:
    with pytest.raises(ValueError, match="costs that are no positive numbers.*Measure again with `calibrate"):
        CostTable({9: {1: 1.0}}, draft, {}, draft_start=start)


def test_costs_that_are_not_monotone_stay_so() -> None:
    table = CostTable({100: {1: 0.039, 2: 0.063, 8: 0.066, 32: 0.108}}, {1: 0.002, 4: 0.004}, {})
    assert table.verify_seconds(2, 50) > 0.06 and table.verify_seconds(20, 50) == pytest.approx(0.087)
    assert table.draft_seconds(2, 3) == pytest.approx(3 * (0.002 + 0.002 / 3))
    assert torch.isfinite(torch.tensor(table.verify_seconds(200, 10**6)))


@pytest.mark.parametrize("top_k", [1, 4, 10])
def test_running_costs_start_with_levels_of_the_policys_own_width(top_k: int) -> None:
    table = CostTable(
        {100: {1: 0.04, 8: 0.06}}, {1: 0.002, 4: 0.004, 16: 0.010}, {}, 0.001, draft_start={1: 0.01, 16: 0.04}
    )
    costs = table.running(100, top_k)
    for levels in (1, 3, 6):
        assert costs.draft_seconds(top_k, levels) == pytest.approx(table.draft_seconds(top_k, levels))
    for width in (1, 4, 16):
        assert costs.draft_seconds(width, 2) == pytest.approx(table.draft_seconds(width, 2)), "and know the others"
    assert costs.level_seconds(top_k) == pytest.approx(table.draft_seconds(top_k, 2) - table.draft_seconds(top_k, 1))
    assert costs.verify_seconds(5) == pytest.approx(table.verify_seconds(5, 100)) and costs.overhead == 0.001
