"""Costs learned while decoding: interpolated, never misled for long by one slow or fast moment."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_resps.policies.costs import CostTable, RunningCosts
from transformers_resps.tree import TreeShape


def test_costs_are_interpolated_and_never_fall_with_more_nodes() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 1.0), (2, 1.9), (8, 1.6), (16, 2.0)):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    two, eight = costs.verify_seconds(2), costs.verify_seconds(8)
    assert two == eight == 1.6, "measured here: two nodes can cost more than eight, and then eight are the better buy"
    assert costs.verify_seconds(12) == pytest.approx(1.8)
    assert costs.verify_seconds(24) > costs.verify_seconds(16)


def test_a_plain_step_may_cost_more_than_a_small_tree() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 47.0), (4, 39.0), (8, 45.0)):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify_seconds(1) == 47.0
    assert [costs.verify_seconds(nodes) for nodes in (2, 3, 4, 6, 8)] == [39.0, 39.0, 39.0, 42.0, 45.0]
    assert costs.verify_seconds(12) == 51.0, "trees tell what further nodes cost, not the plain step"


def test_a_forward_that_took_far_less_than_a_smaller_one_did_makes_the_smaller_one_cheaper() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 3.0), (4, 4.0), (8, 4.0), *[(8, 1.5)] * 4):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify_seconds(1) < costs.verify_seconds(4) == costs.verify_seconds(8) < 1.9


def test_what_was_measured_in_a_slow_moment_does_not_look_expensive_afterwards() -> None:
    costs = RunningCosts()
    for speed, nodes in ((1.0, 1), (1.0, 4), (1.0, 8), *[(1.5, 8)] * 20, *[(1.0, 1)] * 12):
        seconds = speed * (1.0 + 0.02 * (nodes - 1))
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify_seconds(1) == pytest.approx(1.0, abs=0.01)
    assert costs.verify_seconds(4) == pytest.approx(1.06, rel=0.15), "it was not measured then"
    assert costs.verify_seconds(8) == pytest.approx(1.14, rel=0.25), "1.71 in the seconds of then"


def test_an_interruption_of_any_length_changes_what_is_known_by_little() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 1.0), (4, 1.2), (4, 1e6)):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify_seconds(4) < 1.5 and costs.verify_seconds(4) / costs.verify_seconds(1) < 1.3


def test_two_trees_tell_what_further_nodes_cost() -> None:
    """Before that a guess does: between a plain step and a tree lies the cost of a mask, too."""
    costs = RunningCosts()
    for nodes, seconds in ((1, 1.0), (2, 1.1), (4, 1.5)):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify_seconds(8) == pytest.approx(1.5 + 4 * 0.2)


def test_a_further_node_of_each_row_is_assumed_to_be_expensive_in_a_batch() -> None:
    """Before anything but plain steps was measured: eight rows are eight nodes."""
    alone, together = RunningCosts(), RunningCosts()
    alone.add(1, 0, 1.0, 0.0, 1.0)
    together.add(1, 0, 1.0, 0.0, 1.0, rows=8)
    assert alone.verify_seconds(3) == pytest.approx(1.08)
    assert together.verify_seconds(3) == pytest.approx(1.36)


def test_a_copy_learns_on_its_own() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 1.0), (4, 1.2)):
        costs.add(nodes, 2, seconds, 0.1, seconds + 0.2)
    earlier = costs.copy()
    costs.add(8, 3, 9.0, 0.5, 9.6, rows=4)
    assert costs.verify_seconds(8) == 9.0 > earlier.verify_seconds(8)
    assert [earlier.verify_seconds(nodes) for nodes in (1, 4)] == [1.0, 1.2]
    assert earlier.draft_seconds(1, 3) == pytest.approx(0.15) and earlier.overhead == pytest.approx(0.1)


def test_what_looking_up_takes_beside_the_forward_is_learned_and_fades_where_nothing_is_looked_up() -> None:
    costs = RunningCosts()
    costs.add(4, 0, 1.1, 0.3, 1.6, looks_up=True)
    assert costs.lookup_seconds == 0.0, "more than a plain step, of which nothing is known yet"
    costs.add(1, 0, 1.0, 0.1, 1.2)
    costs.add(4, 0, 1.1, 0.3, 1.6, looks_up=True)
    assert costs.lookup_seconds == pytest.approx(0.3) == costs.copy().lookup_seconds
    costs.add(4, 0, 1.1, 20.3, 21.6, looks_up=True)
    assert 0.3 < costs.lookup_seconds < 0.4, "an interruption is no price"
    for _ in range(100):
        costs.add(1, 0, 1.0, 0.1, 1.2)
    assert 0.0 < costs.lookup_seconds < 0.15


def test_a_rescaled_copy_takes_longer_and_leaves_the_original_alone() -> None:
    costs = RunningCosts({1: 1.0, 4: 1.2}, level_seconds=0.1, overhead=0.05)
    longer = costs.rescaled(2.0)
    assert [longer.verify_seconds(nodes) for nodes in (1, 4)] == [2.0, 2.4]
    assert [costs.verify_seconds(nodes) for nodes in (1, 4)] == [1.0, 1.2]
    assert longer.draft_seconds(1, 1) == 0.1 and longer.overhead == 0.05
    longer.add(1, 1, 2.0, 0.3, 2.3)
    assert costs.draft_seconds(1, 1) == 0.1 < longer.draft_seconds(1, 1)


def drafted(costs: RunningCosts, levels: int, seconds: float) -> None:
    costs.add(1, levels, 1.0, seconds, 1.0 + seconds)


@pytest.mark.parametrize(("start", "level"), [(0.0, 0.05), (0.3, 0.01), (0.02, 0.2), (0.3, 0.0)])
def test_a_draft_costs_its_start_and_its_levels(start: float, level: float) -> None:
    costs = RunningCosts()
    for levels in (1, 3, 2, 1, 3, 2, 3, 1, 2, 3, 1, 2):
        drafted(costs, levels, start + level * levels)
    assert costs.level_seconds(1) == pytest.approx(level, abs=0.01)
    for levels in (1, 2, 3, 8):
        assert costs.draft_seconds(1, levels) == pytest.approx(start + level * levels, abs=0.05)
    assert costs.draft_seconds(1, 0) == 0.0


def test_drafts_of_one_depth_are_assumed_to_have_no_start_but_a_further_level_is_worth_a_try() -> None:
    costs = RunningCosts()
    assert costs.draft_seconds(1, 3) == costs.level_seconds(1) == 0.0
    for _ in range(9):
        drafted(costs, 2, 0.4)
    assert costs.draft_seconds(1, 3) == pytest.approx(0.6)
    assert costs.level_seconds(1) == pytest.approx(0.1), "between nothing and all"


def test_the_price_of_a_level_outlasts_many_drafts_of_one_depth_and_follows_new_ones() -> None:
    costs = RunningCosts()
    for step in range(12):
        drafted(costs, 1 + step % 2, 0.3 + 0.02 * (1 + step % 2))
    for _ in range(500):
        drafted(costs, 5, 0.4)
    assert costs.level_seconds(1) == pytest.approx(0.02, abs=0.005)
    assert costs.draft_seconds(1, 1) == pytest.approx(0.32, abs=0.02)
    for step in range(60):
        drafted(costs, 1 + step % 4, 0.1 * (1 + step % 4))
    assert costs.level_seconds(1) == pytest.approx(0.1, abs=0.005)


def test_a_price_of_drafting_is_never_negative_and_an_interruption_moves_it_by_little() -> None:
    costs = RunningCosts()
    for levels, seconds in ((1, 0.2), (2, 0.25), (1, 0.2), (2, 0.25), (4, 1e6)):
        drafted(costs, levels, seconds)
    assert costs.draft_seconds(1, 1) < 0.3 and costs.draft_seconds(1, 4) < 0.6
    for _ in range(40):
        drafted(costs, 1, 0.5)
        drafted(costs, 5, 0.1)
    assert costs.level_seconds(1) == 0.0 < costs.draft_seconds(1, 9)
    for seconds in (0.0, 1.0, 0.0, 3.0):
        drafted(costs, 6, seconds)
        assert min(costs.draft_seconds(1, levels) for levels in (1, 3, 9)) >= 0.0


def test_a_wider_draft_has_a_price_of_its_own_which_outlasts_a_slow_moment() -> None:
    costs = RunningCosts()
    for width, seconds in ((4, 0.2), (8, 0.3), (4, 0.2)):
        costs.add(1, 2, 1.0, seconds, 1.0 + seconds, width=width)
    assert costs.draft_seconds(4, 2) == pytest.approx(0.2) and costs.draft_seconds(8, 2) == pytest.approx(0.3)
    assert costs.level_seconds(8) == pytest.approx(1.5 * costs.level_seconds(4))
    assert costs.draft_seconds(2, 2) == pytest.approx(0.2), "of narrower ones nothing is known"
    assert costs.draft_seconds(10, 2) == pytest.approx(1.25 * 0.3), "a level takes no longer than by its nodes"
    kept = costs.copy()
    for _ in range(40):
        costs.add(1, 2, 1.0, 0.8, 1.8, width=4)
    assert costs.draft_seconds(8, 2) == pytest.approx(1.5 * costs.draft_seconds(4, 2))
    assert kept.draft_seconds(8, 2) == pytest.approx(0.3)


def test_a_first_wide_draft_that_was_interrupted_costs_at_most_what_its_nodes_tell() -> None:
    costs = RunningCosts()
    for width, seconds in ((4, 0.2), (8, 50.0)):
        costs.add(1, 2, 1.0, seconds, 1.0 + seconds, width=width)
    assert costs.draft_seconds(8, 2) == pytest.approx(0.4)


@pytest.mark.parametrize("levels", [1, 3])
def test_a_cold_first_draft_is_outweighed_by_the_next_ones(levels: int) -> None:
    costs = RunningCosts()
    drafted(costs, levels, 1.4)
    for _ in range(4):
        drafted(costs, levels, 0.3)
    assert 0.3 < costs.draft_seconds(1, levels) < 0.45, "their mean is 0.52"
    for _ in range(20):
        drafted(costs, levels, 0.3)
    assert costs.draft_seconds(1, levels) < 0.33


@pytest.mark.parametrize("seed", range(20))
def test_the_curve_is_what_each_size_costs_alone(seed: int) -> None:
    """Whatever was measured in whatever order, and however far the curve was drawn before."""
    drawn = random.Random(seed)
    asked, alone = RunningCosts(), RunningCosts()
    for _ in range(drawn.randint(1, 6)):
        nodes, seconds = drawn.choice((1, 2, 3, 5, 8, 13, 40)), drawn.uniform(0.5, 3.0)
        asked.verify_curve(drawn.randint(1, 50))
        asked.add(nodes, 0, seconds, 0.0, seconds)
        alone.add(nodes, 0, seconds, 0.0, seconds)
    singles = [alone.copy().verify_seconds(nodes) for nodes in range(1, 61)]
    assert list(asked.verify_curve(60))[:60] == singles
    assert singles[1:] == sorted(singles[1:]), "a larger tree is never cheaper"


# Cost tables: interpolated, kept as JSON, and refused where they hold anything but sizes and seconds.
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


def test_a_draft_of_a_table_costs_its_start_and_its_levels(tmp_path: Path) -> None:
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
