"""Nodes that were looked up and nodes of the head compete for the places of one tree."""

import torch

from transformers_resps.policies.base import Observation
from transformers_resps.policies.costs import CostTable
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.tree import TreeShape


def policy_on(slope: float) -> ThroughputPolicy:
    """On a machine where the second node and each further one costs `slope` plain steps, and more beyond eight."""
    seconds = {nodes: 1.0 + slope * (nodes - 1) + max(nodes - 8, 0) for nodes in range(1, 80)}
    table = CostTable({100: seconds}, {1: 0.01, 10: 0.01}, {}, 0.0)
    return ThroughputPolicy(costs=table.running(100))


def chosen(policy: ThroughputPolicy, odds: list[float], head: list[float]) -> tuple[TreeShape, int, int]:
    """A step whose head proposes children of the root: the shape, the head's nodes and the looked-up ones."""
    shape = policy.choose(Observation(None, 100, 0, 50, lambda: odds))
    size = policy.size(torch.tensor([head]).log(), torch.ones(len(head), dtype=torch.long))
    assert isinstance(size, int)
    return shape, size - 1, sum(one >= policy.least_lookup_prob for one in odds[: shape.lookup])


def test_weak_looked_up_nodes_give_their_places_to_better_ones_of_the_head() -> None:
    odds = [0.3, 0.2, 0.15, 0.12, 0.1, 0.1]
    policy = policy_on(slope=0.03)
    shape, drafted, looked_up = chosen(policy, odds, [0.3, 0.25, 0.2, 0.12, 0.1])
    assert shape.lookup == 6, "alone they pay"
    assert drafted >= 2 and 0 < looked_up < 6
    _, drafted, looked_up = chosen(policy_on(slope=0.03), odds, [0.01])
    assert (drafted, looked_up) == (0, 6)


def test_a_draft_is_worth_what_it_adds_to_the_looked_up_nodes_as_it_shows_them() -> None:
    """What the head has, too, is no gain of the head; nor is what it shows to be unlikely a loss."""
    odds = [0.6, 0.3]
    gains = {}
    for name, left, shared in (("agrees", [], [[0, 1]]), ("differs", [0.06, 0.03], [[]])):
        policy = policy_on(slope=0.03)
        told = iter([odds, left])
        policy.choose(Observation(None, 100, 0, 50, lambda told=told: next(told), shared=lambda shared=shared: shared))
        before = policy._memory._gains[True]
        size = policy.size(torch.tensor([[0.6, 0.3]]).log(), torch.tensor([1, 2]))
        assert size == 3, "both nodes of the head"
        gains[name] = policy._memory._gains[True] - before
    assert gains["agrees"] < gains["differs"]
