"""A node is added while its tokens are worth more than the seconds that verifying it takes."""

import pytest

from transformers_resps.policies import RunningCosts
from transformers_resps.policies.throughput import PriceList


def costs_of(slope: float) -> RunningCosts:
    costs = RunningCosts()
    for nodes in (1, 8, 32):
        seconds = 1.0 + slope * (nodes - 1)
        costs.add(nodes, 0, seconds, 0.0, seconds)
    return costs


def test_nodes_are_added_while_they_are_worth_their_seconds() -> None:
    prices = PriceList(32)
    prices.refresh(costs_of(0.2))
    count, gain = prices.best_prefix([0.9, 0.5, 0.3, 0.1], nodes_before=1, rate=1.0)
    assert count == 3 and gain == pytest.approx(0.9 + 0.5 + 0.3 - 3 * 0.2)
    assert prices.best_prefix([0.9, 0.5], nodes_before=1, rate=10.0) == (0, 0.0)


def test_a_node_that_does_not_pay_is_taken_for_the_sake_of_those_behind_it() -> None:
    prices = PriceList(32)
    prices.refresh(costs_of(0.2))
    assert prices.best_prefix([0.1, 0.9], nodes_before=4, rate=1.0)[0] == 2


def test_a_list_is_kept_for_some_steps_unless_a_tree_of_another_size_was_timed() -> None:
    prices, costs = PriceList(32), costs_of(0.2)
    prices.refresh(costs)
    before = prices.best_prefix([0.5], 1, 1.0)
    costs.rescale(3.0)
    prices.refresh(costs)
    assert prices.best_prefix([0.5], 1, 1.0) == before
    for _ in range(8):
        prices.refresh(costs)
    assert prices.best_prefix([0.5], 1, 1.0) == (0, 0.0)
    cheaper = costs_of(0.1)
    cheaper.add(16, 0, 2.5, 0.0, 2.5)
    prices.refresh(cheaper)
    assert prices.best_prefix([0.5], 1, 1.0)[0] == 1
