"""Planted costs and planted heads: the policy must react to each, and the guard must never lose."""

import pytest
import torch

from transformers_resps.policy import FixedPolicy, Guard, Level, Observation, Policy, ThroughputPolicy
from transformers_resps.policy.costs import RunningCosts
from transformers_resps.telemetry import StepRecord
from transformers_resps.tree import TreeShape


class Machine:
    """A fake machine, head and lookup: each level is right with `hit`, each lookup token with `lookup_hit`."""

    def __init__(self, node_seconds: float, level_seconds: float, hit: float, lookup_hit: float = 0.0) -> None:
        self.node_seconds, self.level_seconds = node_seconds, level_seconds
        self.hit, self.lookup_hit = hit, lookup_hit
        self.generator = torch.Generator().manual_seed(0)
        self.tokens, self.seconds = 0, 0.0
        self.shapes: list[TreeShape] = []
        self.verified: list[int] = []

    def run(self, policy: Policy, steps: int) -> float:
        """Tokens per second; a plain step takes one second."""
        for step in range(steps):
            policy.observe(self._step(policy, step))
        return self.tokens / self.seconds

    def _step(self, policy: Policy, step: int) -> StepRecord:
        survival = [self.lookup_hit ** (i + 1) for i in range(8)] if self.lookup_hit else []
        shape = policy.choose(Observation(torch.zeros(1, 4), 100 + step, step, 50, lambda: survival))
        nodes, levels = 1, 0
        if shape.asks_head:
            levels = 1
            while levels < shape.depth and policy.grow(Level(levels, torch.full((1, 1), self.hit).log() * levels)):
                levels += 1
            scores = torch.tensor([[self.hit ** (i + 1) for i in range(levels)]]).log()
            nodes = max(min(policy.size(scores), shape.total_tokens), 1)
        accepted = max(self._run_length(self.hit, nodes - 1), self._run_length(self.lookup_hit, shape.lookup))
        verify = 1.0 + self.node_seconds * (nodes + shape.lookup - 1)
        draft = self.level_seconds * levels
        self.tokens += accepted + 1
        self.seconds += verify + draft
        self.shapes.append(shape)
        self.verified.append(nodes + shape.lookup)
        drafted = levels + shape.lookup
        return StepRecord(shape, drafted, nodes + shape.lookup, accepted, accepted + 1, draft, verify, verify + draft)

    def _run_length(self, hit: float, most: int) -> int:
        length = 0
        while length < most and float(torch.rand((), generator=self.generator)) < hit:
            length += 1
        return length


def test_free_nodes_and_levels_are_used() -> None:
    machine = Machine(node_seconds=0.0, level_seconds=0.0, hit=0.8)
    assert machine.run(ThroughputPolicy(), 200) > 2.5
    assert sum(machine.verified[50:]) / 150 >= 5


def test_ruinous_nodes_are_not() -> None:
    machine = Machine(node_seconds=3.0, level_seconds=0.0, hit=0.8)
    assert machine.run(Guard(ThroughputPolicy()), 600) > 0.97
    assert sum(machine.verified[100:]) / 500 < 1.05


def test_slow_levels_make_shallow_trees() -> None:
    cheap, slow = Machine(0.02, 0.01, hit=0.7), Machine(0.02, 0.5, hit=0.7)
    cheap.run(ThroughputPolicy(), 300)
    slow.run(ThroughputPolicy(), 300)
    assert sum(slow.verified[100:]) < 0.7 * sum(cheap.verified[100:])


def test_a_sure_lookup_is_preferred_to_a_slow_head() -> None:
    machine = Machine(node_seconds=0.02, level_seconds=0.3, hit=0.5, lookup_hit=0.95)
    machine.run(ThroughputPolicy(), 200)
    late = machine.shapes[50:]
    assert sum(shape.lookup >= 4 for shape in late) > 0.9 * len(late)
    assert sum(shape.asks_head for shape in late) < 0.1 * len(late)


def test_it_gains_on_both_sources_alone() -> None:
    for hit, lookup_hit in ((0.8, 0.0), (0.05, 0.8)):
        machine = Machine(node_seconds=0.03, level_seconds=0.05, hit=hit, lookup_hit=lookup_hit)
        assert machine.run(Guard(ThroughputPolicy()), 400) > 1.8


@pytest.mark.parametrize("shape", [TreeShape(60, 8, 10), TreeShape(8, 3, 2), TreeShape(1, 0, 1, lookup=16)])
def test_the_guard_keeps_a_hopeless_drafter_above_097_of_plain(shape: TreeShape) -> None:
    machine = Machine(node_seconds=0.15, level_seconds=0.1, hit=0.01)
    policy = Guard(FixedPolicy(shape))
    assert machine.run(policy, 300) > 0.97
    assert any(not shape.is_plain for shape in machine.shapes[100:]), "it must probe again"


def test_the_guard_costs_a_good_drafter_next_to_nothing() -> None:
    alone = Machine(0.02, 0.02, hit=0.8).run(FixedPolicy(TreeShape(6, 5, 1)), 500)
    guarded = Machine(0.02, 0.02, hit=0.8).run(Guard(FixedPolicy(TreeShape(6, 5, 1))), 500)
    assert guarded > 0.95 * alone


def test_the_guard_notices_when_a_head_stops_being_right() -> None:
    machine = Machine(0.1, 0.1, hit=0.8)
    policy = Guard(FixedPolicy(TreeShape(6, 5, 1)))
    machine.run(policy, 100)
    machine.hit = 0.0
    machine.tokens, machine.seconds = 0, 0.0
    assert machine.run(policy, 300) > 0.94


def test_costs_are_interpolated_and_never_fall_with_more_nodes() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 1.0), (2, 1.9), (8, 1.6), (16, 2.0)):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify(2) == costs.verify(8) == 1.9, "measured here: two nodes can cost more than eight"
    assert costs.verify(12) == pytest.approx(1.95)
    assert costs.verify(24) > costs.verify(16)


def test_a_clock_that_jumps_or_stands_still_is_survived() -> None:
    for policy in (ThroughputPolicy(), Guard(ThroughputPolicy())):
        observation = Observation(torch.full((1, 4), torch.nan), 9, 0, 20, lambda: [0.9, 0.8])
        for seconds in (0.0, -5.0, 1.0, 1e9, 0.0):
            shape = policy.choose(observation)
            policy.observe(StepRecord(shape, 0, 1 + shape.lookup, 0, 1, 0.0, seconds, seconds))
        assert isinstance(policy.choose(observation), TreeShape)
