"""Which width trees get, on a machine with planted costs: from the clock where every path costs, else from drafts."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from transformers_resps.policies.base import Level, Observation, Policy, count_nodes
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy, WiderDrafts, WidthMemory, narrowed
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import Pricing, TreeShape


# Probability that each child of a right node is the right one: four count, or all ten
CHILDREN = (0.5, 0.3, 0.1, 0.05, *[1e-9] * 6)
SIBLINGS = (0.3, 0.14, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.03)


class Forks:
    """A target whose paths cost and a calibrated head, both planted.

    Args:
        path_seconds: of a node on a path, beyond the first, where a plain step takes 1.
        leaf_seconds: of a path beyond the first, as in the invariant mode.
        paths_cost: what the policy is told.
        verify: nodes -> seconds of a forward, paths aside.
        node_seconds: of each further node of a level of the head, of which one takes 0.05.
        children: what the head claims, and what is true but for a `useless` one.
    """

    def __init__(
        self,
        path_seconds: float,
        leaf_seconds: float = 0.0,
        *,
        paths_cost: bool = True,
        verify: Callable[[int], float] = lambda nodes: 1.0 + 0.02 * (nodes - 1),
        node_seconds: float = 0.0,
        children: Sequence[float] = CHILDREN,
        useless: bool = False,
        seed: int = 0,
    ) -> None:
        self.path_seconds, self.leaf_seconds, self.paths_cost = path_seconds, leaf_seconds, paths_cost
        self.verify, self.node_seconds, self.children, self.useless = verify, node_seconds, children, useless
        self.random = random.Random(seed)
        self.tokens, self.expected, self.seconds = 0, 0.0, 0.0
        self.leaves: list[int] = []  # of each step that asked the head, as the next two
        self.widths: list[int] = []
        self.verified: list[int] = []

    @property
    def speed(self) -> float:
        """In that of plain decoding, by what trees are expected to write: luck aside."""
        return self.expected / self.seconds * self.verify(1)

    def run(self, policy: Policy, steps: int) -> None:
        for step in range(steps):
            shape = policy.choose(
                Observation(
                    torch.zeros(1, 4), 100 + step, step, 200, lambda: [], pricing=Pricing(paths_cost=self.paths_cost)
                )
            )
            policy.observe(self._step(policy, shape))

    def _step(self, policy: Policy, shape: TreeShape) -> StepRecord:
        pool = self._grow(policy, shape)
        count = 1
        if pool:
            scores, levels = [self.path_score(path) for path in pool], [len(path) for path in pool]
            count = min(
                *count_nodes(policy, torch.tensor([scores]), torch.tensor(levels)), shape.total_tokens, len(pool) + 1
            )
        kept = sorted(pool, key=self.path_score, reverse=True)[: count - 1]
        leaves = [path for path in kept if not any(other[:-1] == path for other in kept)]
        depth = 1 + max(map(len, kept), default=0)
        paths = max(len(leaves), 1)
        verify = self.verify(count) + self.path_seconds * (paths * depth - 1) + self.leaf_seconds * (paths - 1)
        draft = (0.05 + self.node_seconds * (shape.top_k - 1)) * (len(pool[-1]) if pool else 0)
        if shape.asks_head:
            self.leaves.append(len(leaves))
            self.widths.append(shape.top_k)
            self.verified.append(count)
        self.expected += 1.0 + sum(math.exp(self.path_score(path)) for path in kept) * (not self.useless)
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
            frontier = sorted(children, key=self.path_score, reverse=True)[: shape.top_k]
            scores = torch.tensor([[self.path_score(path) for path in frontier]])
            if level < shape.depth and not policy.grow(Level(level, scores)):
                break
        return pool

    def _rank(self) -> int:
        ranks = range(len(self.children) + 1)
        return self.random.choices(ranks, [*self.children, 1.0 - sum(self.children)])[0] + 99 * self.useless

    def path_score(self, path: tuple[int, ...]) -> float:
        return sum(math.log(self.children[rank]) for rank in path)


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


@pytest.mark.parametrize(("most", "first"), [(10, 4), (4, 4), (3, 3)])
def test_where_paths_cost_nothing_trees_begin_with_four_children(most: int, first: int) -> None:
    policy = ThroughputPolicy(top_k=most)
    policy.observe(StepRecord(TreeShape.plain(), 0, 1, RowCounts([0]), RowCounts([1]), 0.0, 1.0, 1.0))
    assert policy.choose(Observation(torch.zeros(1, 4), 100, 1, 50, lambda: [])).top_k == first


SMALL = {"depth": 5, "top_k": 4, "most_nodes": 16}  # right where nodes are expensive


def run(policy: ThroughputPolicy, steps: int = 400, **machine: Any) -> Forks:
    forks = Forks(0.0, paths_cost=False, **machine)
    forks.run(BaselineGuard(policy), steps)
    return forks


def flat(nodes: int) -> float:
    return 1.0 + 0.0003 * nodes


def test_where_sixty_nodes_cost_what_one_costs_trees_become_wide_and_large() -> None:
    policies = ThroughputPolicy(), ThroughputPolicy(**SMALL)
    wide, small = (run(policy, verify=flat, children=SIBLINGS) for policy in policies)
    assert set(wide.widths[-100:]) == {10} and sum(wide.verified[-100:]) > 100 * 40
    assert set(small.widths) == {4} and max(small.verified) == 17
    assert wide.speed > 1.1 * small.speed


def test_wider_levels_that_take_more_than_they_gain_are_hardly_ever_drafted() -> None:
    options = {"verify": flat, "children": SIBLINGS, "node_seconds": 0.05}
    wide, four = run(ThroughputPolicy(), **options), run(ThroughputPolicy(top_k=4), **options)
    assert wide.widths.count(4) > 0.97 * len(wide.widths)
    assert wide.speed > 0.99 * four.speed


def test_wider_levels_that_became_dear_are_given_up() -> None:
    forks, policy = Forks(0.0, paths_cost=False, verify=flat, children=SIBLINGS), BaselineGuard(ThroughputPolicy())
    forks.run(policy, 200)
    assert forks.widths[-1] == 10
    forks.node_seconds = 0.02
    forks.run(policy, 200)
    assert forks.widths[-100:].count(10) < 5


def to_twelve(nodes: int) -> float:
    """Zen 4 with our kernels: flat to a dozen rows."""
    return 1.0 if nodes <= 12 else 1.0 + 0.03 * (nodes - 12)


@pytest.mark.parametrize("verify", [0.04, 0.2, to_twelve], ids=["0.04", "0.2", "to twelve"])
@pytest.mark.parametrize("node_seconds", [0.0, 0.004])
def test_where_nodes_are_expensive_nothing_is_lost_by_finding_out(
    verify: float | Callable[[int], float], node_seconds: float
) -> None:
    def planted(nodes: int) -> float:
        return verify(nodes) if callable(verify) else 1.0 + verify * (nodes - 1)

    options = {"verify": planted, "node_seconds": node_seconds, "children": SIBLINGS}
    found, small = (
        sum(run(ThroughputPolicy(**sizes), 300, **options, seed=seed).speed for seed in range(8))
        for sizes in ({}, SMALL)
    )
    assert found > 0.99 * small


@pytest.mark.parametrize("steps", [200, 400])
def test_a_useless_head_costs_at_most_three_percent_where_trees_may_be_large(steps: int) -> None:
    for verify in (flat, to_twelve):
        for node_seconds in (0.0, 0.02):
            forks = run(ThroughputPolicy(), steps, verify=verify, node_seconds=node_seconds, useless=True)
            assert forks.tokens == steps and forks.speed > 0.97


def test_a_narrower_draft_is_found_in_a_wider_one() -> None:
    forks = Forks(0.0)
    pools = {width: forks._grow(ThroughputPolicy(), TreeShape(65, 3, width)) for width in (2, 3)}
    score = {path: forks.path_score(path) for path in pools[3]}
    scores = torch.tensor([[score[path] for path in pools[3]]])
    found = narrowed(scores, [0, 3, 12, 21], 3, 2)
    assert found is not None and found[1] == [0, 2, 6, 10]
    assert found[0].tolist() == [pytest.approx([score[path] for path in pools[2]])]
    assert narrowed(scores[:, :-1], [0, 3, 12, 20], 3, 2) is None, "several sources were merged"


def test_the_next_width_is_tried_ever_less_until_it_gains() -> None:
    widths, chosen = WiderDrafts(10), []
    for _ in range(600):
        chosen.append(widths.choose())
        widths.note(-0.1)
    assert set(chosen) == {(4, 0), (8, 4)}
    assert [place for place, (width, _) in enumerate(chosen) if width == 8] == [7, 23, 55, 119, 247, 503]
    while widths.choose()[0] == 4:
        pass
    widths.note(2.0)
    assert widths.choose() == (8, 4)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_width_that_never_wins_is_tried_ever_less(most: int) -> None:
    memory, chosen = WidthMemory(most), []
    for _ in range(1200):
        chosen.append(memory.choose(most))
        memory.add(2.0, 1.0 if chosen[-1] == 1 else 1.5)
    trials = [step for step, width in enumerate(chosen) if width > 1]
    assert trials == ([] if most == 1 else [8, 25, 58, 123, 252, 509, 766, 1023])
    assert set(chosen[step] for step in trials) <= {2}


def test_a_batch_that_allows_only_chains_teaches_nothing_about_wider_drafts() -> None:
    memory = WidthMemory(4)
    for step in range(400):
        assert memory.choose(1) == 1
        memory.add(2.0, 0.5 + 0.5 * (step % 9 != 8))  # every step after eight, when a trial is due, is fast by chance
    assert memory.choose(4) == 2, "the first trial"
    memory.add(2.0, 9.0)
    assert memory.choose(4) == 1
