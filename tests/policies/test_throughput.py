"""Planted costs and planted heads: the policy must react to each."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.policies.machine import FLAT, JUMPING, SLOPING, Machine
from transformers_resps.policies.acceptance_model import AcceptanceModel, PlattScaling
from transformers_resps.policies.auto import default_policy
from transformers_resps.policies.base import Observation, Policy
from transformers_resps.policies.costs import CostTable, RunningCosts
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.saving import AutoPolicy
from transformers_resps.policies.throughput import ThroughputPolicy, best_prefix
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import TreeShape


def test_free_nodes_and_levels_are_used() -> None:
    machine = Machine(0.0, level_seconds=0.0, hit=0.8)
    assert machine.run(ThroughputPolicy(), 200) > 2.5
    assert sum(machine.verified[50:]) / 150 >= 5


def test_ruinous_nodes_are_not() -> None:
    machine = Machine(3.0, level_seconds=0.0, hit=0.8)
    assert machine.run(BaselineGuard(ThroughputPolicy()), 600) > 0.97
    assert sum(machine.verified[100:]) / 500 < 1.05


def test_slow_levels_make_shallow_trees() -> None:
    cheap, slow = Machine(0.02, 0.01, hit=0.7), Machine(0.02, 0.5, hit=0.7)
    cheap.run(ThroughputPolicy(), 300)
    slow.run(ThroughputPolicy(), 300)
    assert sum(slow.verified[100:]) < 0.7 * sum(cheap.verified[100:])


class Proportional(RunningCosts):
    """Prices drafts by the nearest depth that was seen, as if all had no start."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, float] = {}

    def add(self, nodes: int, levels: int, verify: float, draft: float, step: float, **more: Any) -> None:
        super().add(nodes, levels, verify, draft, step, **more)
        self.seen |= {levels: draft} if levels else {}

    def draft_seconds(self, width: int, levels: int) -> float:
        nearest = min(self.seen, key=lambda known: abs(known - levels), default=1)
        return self.seen.get(nearest, 0.0) * levels / nearest

    def level_seconds(self, width: int) -> float:
        return self.draft_seconds(width, 1)


@pytest.mark.parametrize(
    ("start", "level", "gain"), [(0.5, 0.01, 1.5), (0.3, 0.02, 1.15), (0.5, 0.0, 1.5), (0.02, 0.3, 0.98)]
)
def test_the_start_of_a_draft_does_not_keep_from_further_levels(start: float, level: float, gain: float) -> None:
    """Proportional prices charge every level with the start; where there is hardly any, both choose as well."""
    rates = []
    for costs in (Proportional, RunningCosts):
        machines = [Machine(0.03, level, hit=0.8, seed=seed, start_seconds=start) for seed in range(4)]
        rates.append(sum(machine.run(ThroughputPolicy(costs=costs()), 200) for machine in machines))
    assert rates[1] > gain * rates[0]


def test_a_source_of_an_expensive_start_comes_to_deep_drafts_below_a_guard() -> None:
    machine, policy = Machine(0.03, 0.01, hit=0.85, start_seconds=0.5), BaselineGuard(ThroughputPolicy())
    speeds = [machine.write(policy, 160) for _ in range(6)]
    assert min(speeds) > 0.97 and speeds[-1] > 2.0


def test_a_sure_lookup_is_preferred_to_a_slow_head() -> None:
    machine = Machine(0.02, level_seconds=0.3, hit=0.5, lookup_hit=0.95)
    machine.run(ThroughputPolicy(), 200)
    late = machine.shapes[50:]
    assert sum(shape.lookup >= 4 for shape in late) > 0.9 * len(late)
    assert sum(shape.asks_head for shape in late) < 0.1 * len(late)


def test_it_gains_on_both_sources_alone() -> None:
    for hit, lookup_hit in ((0.8, 0.0), (0.05, 0.8)):
        machine = Machine(0.03, level_seconds=0.05, hit=hit, lookup_hit=lookup_hit)
        assert machine.run(BaselineGuard(ThroughputPolicy()), 400) > 1.8


@pytest.mark.parametrize("hit", [0.5, 0.6])
def test_after_copied_text_the_head_is_asked_as_before(hit: float) -> None:
    after = before = 0.0
    for seed in range(24):
        machine, policy = Machine(0.03, 0.06, hit=hit, seed=seed), default_policy()
        before += [machine.write(policy, 128) for _ in range(4)][-1]
        machine.lookup_hit = 0.97
        assert machine.write(policy, 256) > 4
        machine.lookup_hit = 0.0
        after += machine.write(policy, 128)
    assert after > 0.97 * before


def test_what_was_learned_stays_between_calls_and_comes_near_the_best_fixed_chain() -> None:
    for verify, level, share in ((FLAT, 0.001, 0.9), (SLOPING, 0.003, 0.85), (JUMPING, 0.005, 0.8)):
        fixed = max(
            Machine(verify, level, 0.75).run(FixedPolicy(TreeShape(levels + 1, levels, 1)), 1500)
            for levels in range(1, 6)
        )
        firsts, rates = [], []
        for seed in range(4):
            machine, policy = Machine(verify, level, 0.75, claimed=0.8, seed=seed), default_policy()
            firsts.append(machine.write(policy, 96))
            rates += [machine.write(policy, 96) for _ in range(10)]
        mean = sum(rates) / len(rates)
        assert mean > max(sum(firsts) / len(firsts), 1.0), "the first call had to find out"
        assert mean >= share * fixed * verify(1)


def test_a_fitted_policy_is_saved_with_its_guard_and_loaded_by_type(tmp_path: Path) -> None:
    scalings = [PlattScaling(-0.3, 0.8), PlattScaling(0.1, 0.7), PlattScaling(), PlattScaling(0.0, 0.5)]
    policy = BaselineGuard(ThroughputPolicy(depth=4, top_k=2, most_nodes=9, acceptance=AcceptanceModel(scalings)))
    policy.save_pretrained(tmp_path)
    loaded = AutoPolicy.from_pretrained(tmp_path)
    assert isinstance(loaded, BaselineGuard) and isinstance(loaded.policy, ThroughputPolicy)
    assert loaded.to_config() == policy.to_config()
    scores = [-0.1, -1.0, -3.0]
    for level in range(1, 6):
        assert loaded.policy.acceptance.probabilities(scores, level) == pytest.approx(
            policy.policy.acceptance.probabilities(scores, level)
        )
    with pytest.raises(ValueError, match="guarded Unsaved has no `save_pretrained`.*Subclass"):
        BaselineGuard(Unsaved()).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "saved",
    [
        [[0.0, 1e30]] * 4,
        [[-1e30, 1.0]] * 4,
        [[math.nan, 1.0]] * 4,
        [[0.1, 0.9, 1.0]] * 4,
        [0.1],
        None,
    ],
    ids=["slope", "intercept", "nan", "three columns", "one number", "missing"],
)
def test_weights_that_no_fit_gives_are_refused(saved: list[list[float]] | None, tmp_path: Path) -> None:
    BaselineGuard(ThroughputPolicy()).save_pretrained(tmp_path)
    tensors = {"other": torch.zeros(1)} if saved is None else {"odds": torch.tensor(saved)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="of a throughput policy hold .*must hold an intercept.*Download or save"):
        AutoPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("most_nodes", [10**6, 4096, -1, "a", True, 2.0, None])
def test_more_nodes_than_can_be_priced_are_refused(most_nodes: int) -> None:
    with pytest.raises(ValueError, match="got `most_nodes=.*must be an integer from 0 to 4095.*Leave it out"):
        ThroughputPolicy(most_nodes=most_nodes)


@pytest.mark.parametrize(
    "values", [{"costs": CostTable({128: {1: 0.1}}, {}, {})}, {"costs": {1: 2.0}}, {"acceptance": 3}]
)
def test_costs_and_acceptance_of_another_kind_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs `RunningCosts` and `AcceptanceModel`.*got costs=.*Pass `table"):
        ThroughputPolicy(**values)


def test_a_policy_that_was_saved_with_smaller_limits_keeps_to_them() -> None:
    """Files of earlier releases name 16 nodes, five levels and four children."""
    config = {"depth": 5, "top_k": 4, "most_nodes": 16}
    odds = {"odds": torch.tensor([[0.0, 1.0]] * 4)}
    policy = ThroughputPolicy.from_saved(config, odds)
    assert policy.to_config() == config and policy.widths == (4,)
    machine = Machine(FLAT, 0.001, hit=0.95)
    machine.write(policy, 256)
    assert max(machine.verified) == 6 and max(shape.top_k for shape in machine.shapes) == 4


def test_eight_levels_are_drafted_where_they_pay() -> None:
    machine = Machine(FLAT, 0.001, hit=0.95)
    machine.write(ThroughputPolicy(), 256)
    assert max(machine.verified) == 9


class Unsaved(Policy):
    def choose(self, observation: Observation) -> TreeShape:
        return TreeShape.plain()


def test_small_trees_are_used_where_they_cost_less_than_a_plain_step() -> None:
    machine = Machine(lambda nodes: 1.0 if nodes == 1 else 0.8 + 0.03 * nodes, level_seconds=0.02, hit=0.15)
    assert machine.run(BaselineGuard(ThroughputPolicy()), 300) > 1.1


def test_a_clock_that_jumps_or_stands_still_is_survived() -> None:
    for policy in (ThroughputPolicy(), BaselineGuard(ThroughputPolicy())):
        observation = Observation(torch.full((1, 4), torch.nan), 9, 0, 20, lambda: [0.9, 0.8])
        for seconds in (0.0, -5.0, 1.0, 1e9, 0.0):
            shape = policy.choose(observation)
            policy.observe(
                StepRecord(shape, 0, 1 + shape.lookup, RowCounts([0]), RowCounts([1]), 0.0, seconds, seconds)
            )
        assert isinstance(policy.choose(observation), TreeShape)


def test_nodes_are_added_while_they_are_worth_their_seconds() -> None:
    seconds = [1.0 + 0.2 * nodes for nodes in range(32)]
    count, gain = best_prefix(seconds, [0.9, 0.5, 0.3, 0.1], rate=1.0)
    assert count == 3 and gain == pytest.approx(0.9 + 0.5 + 0.3 - 3 * 0.2)
    assert best_prefix(seconds, [0.9, 0.5], rate=10.0) == (0, 0.0)


def test_a_node_that_does_not_pay_is_taken_for_the_sake_of_those_after_it() -> None:
    assert best_prefix([1.0, 1.2, 1.4], [0.1, 0.9], rate=1.0)[0] == 2


def test_a_changed_cost_is_seen_at_the_next_step() -> None:
    """Eight looked-up nodes pay until the machine turns out to be slower at trees of eight."""
    costs = RunningCosts({1: 1.0, 9: 1.4}, level_seconds=0.0)
    policy = ThroughputPolicy(costs=costs)
    observation = Observation(None, 100, 1, 96, lambda: [0.95**place for place in range(1, 9)], can_draft=False)
    assert policy.choose(observation).lookup == 8
    for _ in range(60):
        costs.add(1, 0, 1.0, 0.0, 1.0)
        costs.add(9, 0, 12.0, 0.0, 12.0)
    assert policy.choose(observation).lookup == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_one_pass_gives_all_levels_all_are_drafted_and_nobody_asks_between_them(device: str) -> None:
    """Further levels and children cost nothing there: how many nodes pay is decided afterwards."""
    shapes = {}
    for at_once in (False, True):
        policy = ThroughputPolicy(costs=RunningCosts({1: 0.02, 8: 0.03}, 0.02, start_seconds=0.001))
        seen = Observation(None, 50, 3, 100, list, device_type=device, drafts_at_once=at_once)
        shapes[at_once] = policy.choose(seen)
        assert policy.grows is (device == "cpu" and not at_once)
    assert (shapes[True].depth, shapes[True].top_k) == (8, 10)
    assert (shapes[False].depth, shapes[False].top_k) != (8, 10)
