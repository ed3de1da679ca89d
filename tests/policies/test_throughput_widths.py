"""Which width trees get where every path costs: found from the clock, on a machine with planted costs."""

import math
import random

import pytest
import torch

from transformers_resps.policies.base import Level, Observation, Policy, count_nodes
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy, WidthMemory
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import TreeShape


CHILDREN = (0.5, 0.3, 0.1, 0.05)  # probability that each child of a right node is the right one


class Forks:
    """A target whose paths cost and a calibrated head, both planted.

    Args:
        path_seconds: of a node on a path, beyond the first, where a plain step takes 1, as with recurrent layers.
        leaf_seconds: of a path beyond the first, as in the invariant mode.
        paths_cost: what the policy is told.
    """

    def __init__(self, path_seconds: float, leaf_seconds: float = 0.0, *, paths_cost: bool = True) -> None:
        self.path_seconds, self.leaf_seconds, self.paths_cost = path_seconds, leaf_seconds, paths_cost
        self.random = random.Random(0)
        self.tokens, self.seconds = 0, 0.0
        self.leaves: list[int] = []  # of each step that asked the head

    def run(self, policy: Policy, steps: int) -> None:
        for step in range(steps):
            shape = policy.choose(
                Observation(torch.zeros(1, 4), 100 + step, step, 50, lambda: [], paths_cost=self.paths_cost)
            )
            policy.observe(self._step(policy, shape))

    def _step(self, policy: Policy, shape: TreeShape) -> StepRecord:
        pool = self._grow(policy, shape)
        count = 1
        if pool:
            scores, levels = [path_score(path) for path in pool], [len(path) for path in pool]
            count = min(
                *count_nodes(policy, torch.tensor([scores]), torch.tensor(levels)), shape.total_tokens, len(pool) + 1
            )
        kept = sorted(pool, key=path_score, reverse=True)[: count - 1]
        leaves = [path for path in kept if not any(other[:-1] == path for other in kept)]
        depth = 1 + max(map(len, kept), default=0)
        paths = max(len(leaves), 1)
        verify = 1.0 + 0.02 * (count - 1) + self.path_seconds * (paths * depth - 1) + self.leaf_seconds * (paths - 1)
        draft = 0.05 * (depth - 1)
        if shape.asks_head:
            self.leaves.append(len(leaves))
        right: tuple[int, ...] = ()
        while (*right, rank := self._rank()) in kept:
            right = (*right, rank)
        self.tokens, self.seconds = self.tokens + len(right) + 1, self.seconds + verify + draft
        matched = len(right) + ((*right, rank) in pool)
        counts = RowCounts([len(right)]), RowCounts([len(right) + 1])
        return StepRecord(
            shape, len(pool), count, *counts, draft, verify, verify + draft, RowCounts([min(matched, len(right) + 1)])
        )

    def _grow(self, policy: Policy, shape: TreeShape) -> list[tuple[int, ...]]:
        """Paths of child ranks, level by level, as EAGLE-2 grows them."""
        pool: list[tuple[int, ...]] = []
        frontier: list[tuple[int, ...]] = [()]
        for level in range(1, shape.depth + 1 if shape.asks_head else 1):
            children = [(*path, rank) for path in frontier for rank in range(shape.top_k)]
            pool += children
            frontier = sorted(children, key=path_score, reverse=True)[: shape.top_k]
            scores = torch.tensor([[path_score(path) for path in frontier]])
            if level < shape.depth and not policy.grow(Level(level, scores)):
                break
        return pool

    def _rank(self) -> int:
        return self.random.choices(range(len(CHILDREN) + 1), [*CHILDREN, 1.0 - sum(CHILDREN)])[0]


def path_score(path: tuple[int, ...]) -> float:
    return sum(math.log(CHILDREN[rank]) for rank in path)


def test_expensive_paths_make_chains() -> None:
    machine = Forks(path_seconds=0.2)
    machine.run(BaselineGuard(ThroughputPolicy()), 600)
    late = machine.leaves[len(machine.leaves) // 2 :]
    assert late.count(1) > 0.9 * len(late), late
    assert machine.tokens / machine.seconds > 0.99  # plain decoding writes one token a second


def test_trees_that_cost_by_their_leaves_end_as_chains_which_are_deeper() -> None:
    machine = Forks(path_seconds=0.0, leaf_seconds=0.25)
    machine.run(BaselineGuard(ThroughputPolicy()), 600)
    late = machine.leaves[len(machine.leaves) // 2 :]
    assert late.count(1) > 0.9 * len(late), late
    assert machine.tokens / machine.seconds > 1.3


def test_paths_that_cost_nothing_make_forks() -> None:
    machine = Forks(path_seconds=0.0)
    machine.run(BaselineGuard(ThroughputPolicy()), 600)
    late = machine.leaves[len(machine.leaves) // 2 :]
    assert sum(count > 1 for count in late) > 0.7 * len(late), late
    assert machine.tokens / machine.seconds > 1.3


def test_where_paths_cost_nothing_trees_are_as_wide_as_the_policy_allows() -> None:
    machine = Forks(path_seconds=0.2, paths_cost=False)
    policy = ThroughputPolicy()
    policy.observe(StepRecord(TreeShape.plain(), 0, 1, RowCounts([0]), RowCounts([1]), 0.0, 1.0, 1.0))
    shape = policy.choose(Observation(torch.zeros(1, 4), 100, 1, 50, lambda: [], paths_cost=machine.paths_cost))
    assert shape.top_k == 4


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_width_that_never_wins_is_tried_ever_less(most: int) -> None:
    memory, chosen = WidthMemory(most), []
    for _ in range(1200):
        chosen.append(memory.choose(most))
        memory.add(2.0, 1.0 if chosen[-1] == 1 else 1.5)
    trials = [step for step, width in enumerate(chosen) if width > 1]
    assert trials == ([] if most == 1 else [8, 25, 58, 123, 252, 509, 766, 1023])
    assert set(chosen[step] for step in trials) <= {2}
