"""What the guard makes of a batch, whose rows have outcomes and prices of their own."""

from dataclasses import replace

import pytest
import torch

from tests.policies.rows import observation, record
from transformers_resps.policies.base import count_nodes
from transformers_resps.policies.costs import RunningCosts
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.tree import Pricing, TreeShape


CHAIN = TreeShape(4, 3, 1)


def test_a_row_may_lag_behind_by_luck_before_it_counts_as_slower() -> None:
    """Rows that take turns in being right gain one and a half tokens a step of one and a fifth of a plain step."""
    guard = BaselineGuard(FixedPolicy(TreeShape(2, 1, 1)))
    drafted = []
    for step in range(120):
        shape = guard.choose(observation(4, step))
        nodes = 1 if shape.is_plain else 2
        drafted.append(nodes == 2)
        lucky = step // 5 % 2  # five steps in a row
        emitted = tuple(1 + (nodes == 2 and row % 2 == lucky) for row in range(4))
        guard.observe(record(nodes, emitted, 1.0 if nodes == 1 else 1.2))
    assert sum(drafted) > 110


def test_the_next_batch_begins_with_what_steps_cost_before_rows_had_ended() -> None:
    guard = BaselineGuard(FixedPolicy(CHAIN))
    guard.choose(observation(4, 0))
    guard.observe(record(1, (1,) * 4, 1.0))
    guard.choose(observation(4, 1))
    guard.observe(record(2, (2,) * 4, 1.5))
    for step in range(2, 12):
        guard.choose(observation(1, step))
        guard.observe(record(2, (2, 0, 0, 0), 0.3))
    assert guard._known.verify_seconds(2) < 0.5
    guard.choose(observation(4, 0))
    assert guard._known.verify_seconds(2) == 1.5 and guard._plain.seconds == 1.0


@pytest.mark.parametrize(("rows", "drafts"), [(5, False), (4, True)])
def test_what_was_too_expensive_for_eight_rows_is_tried_again_for_half_of_them(rows: int, drafts: bool) -> None:
    guard = BaselineGuard(FixedPolicy(TreeShape(2, 1, 1)))
    guard._own_costs = RunningCosts({1: 1.0, 2: 1.2}, 0.05)
    written, step = 0, 0

    def next_step(emitted: tuple[int, ...]) -> bool:
        nonlocal step
        step += 1
        shape = guard.choose(observation(8, step))
        guard.observe(record(1 if shape.is_plain else 2, emitted, 1.0 if shape.is_plain else 1.3))
        return not shape.is_plain

    while next_step((1,) * 8) or written < 2:
        written += 1
    assert not any(next_step((1,) * 8) for _ in range(3))
    fewer = (1,) * rows + (0,) * (8 - rows)
    assert any(next_step(fewer) for _ in range(3)) is drafts


def test_the_budget_pays_for_the_nodes_of_all_rows_together() -> None:
    """Two nodes for each of four rows are too expensive, eight for one of them are not more so."""

    class Greedy(FixedPolicy):
        def size(self, scores: torch.Tensor, levels: torch.Tensor) -> list[int]:
            return [9, 1, 1, 1]

    guard = BaselineGuard(Greedy(TreeShape(9, 1, 8)))
    guard._own_costs = RunningCosts({1: 1.0, 5: 1.2, 33: 3.0}, 0.01)
    guard._plain.seconds = 1.0
    guard._budget.seconds = -0.3
    seen = replace(observation(4, 3), pricing=Pricing(packs_rows=True), row_accept_probs=lambda: [[]] * 4)
    guard.choose(seen)
    (most, *others) = count_nodes(guard, torch.zeros(4, 8), torch.ones(8))
    assert others == [1, 1, 1] and 1 < most < 9
    guard._budget.seconds = 8.0
    guard.choose(seen)
    assert count_nodes(guard, torch.zeros(4, 8), torch.ones(8)) == [9, 1, 1, 1]
