"""Planted costs and planted heads: the policy must react to each."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.policy.machine import FLAT, JUMPING, SLOPING, Machine
from transformers_resps.calibration.cost_table import CostTable
from transformers_resps.policy import (
    AcceptanceModel,
    AutoPolicy,
    BaselineGuard,
    FixedPolicy,
    Observation,
    PlattScaling,
    Policy,
    RunningCosts,
    ThroughputPolicy,
    default_policy,
)
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
    for seed in range(6):
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


def test_scalings_of_fewer_levels_than_are_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match="one scaling for each of 4 levels, got 1. Fill up"):
        AcceptanceModel([PlattScaling()])


def test_a_head_that_claims_too_much_is_believed_less_with_every_outcome() -> None:
    acceptance = AcceptanceModel()
    before = acceptance.of([math.log(0.6)], 1)[0]
    assert before == pytest.approx(0.6)
    for _ in range(60):
        acceptance.learn([acceptance.of([math.log(0.6)], 1)[0]], drafted_match=0, emitted=1)
    assert acceptance.of([math.log(0.6)], 1)[0] < 0.12
    for _ in range(200):
        acceptance.learn([acceptance.of([math.log(0.3)], 1)[0]], drafted_match=1, emitted=1)
    assert acceptance.of([math.log(0.3)], 1)[0] > 0.85, "and one that claims too little, more"


def test_what_follows_the_steps_own_tokens_is_no_evidence() -> None:
    acceptance = AcceptanceModel()
    acceptance.learn([0.5, 0.3], drafted_match=1, emitted=1)
    assert acceptance.hit_rate(2) == AcceptanceModel().hit_rate(2) and acceptance.hit_rate(
        1
    ) > AcceptanceModel().hit_rate(1)


def test_a_fitted_policy_is_saved_with_its_guard_and_loaded_by_type(tmp_path: Path) -> None:
    scalings = [PlattScaling(-0.3, 0.8), PlattScaling(0.1, 0.7), PlattScaling(), PlattScaling(0.0, 0.5)]
    policy = BaselineGuard(ThroughputPolicy(depth=4, top_k=2, most_nodes=9, acceptance=AcceptanceModel(scalings)))
    policy.save_pretrained(tmp_path)
    loaded = AutoPolicy.from_pretrained(tmp_path)
    assert isinstance(loaded, BaselineGuard) and isinstance(loaded.policy, ThroughputPolicy)
    assert loaded.to_config() == policy.to_config()
    scores = [-0.1, -1.0, -3.0]
    for level in range(1, 6):
        assert loaded.policy.acceptance.of(scores, level) == pytest.approx(policy.policy.acceptance.of(scores, level))
    with pytest.raises(ValueError, match="guarded Unsaved has no `save_pretrained`.*Subclass"):
        BaselineGuard(Unsaved()).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "saved",
    [
        [[0.0, 1e30]] * 4,
        [[-1e30, 1.0]] * 4,
        [[math.nan, 1.0]] * 4,
        [[0.1, 0.9]] * 3,
        [[0.1, 0.9, 1.0]] * 4,
        [0.1],
        None,
    ],
    ids=["slope", "intercept", "nan", "three levels", "three columns", "one number", "missing"],
)
def test_weights_that_no_fit_gives_are_refused(saved: list[list[float]] | None, tmp_path: Path) -> None:
    BaselineGuard(ThroughputPolicy()).save_pretrained(tmp_path)
    tensors = {"other": torch.zeros(1)} if saved is None else {"odds": torch.tensor(saved)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="of a throughput policy hold .*must hold an intercept.*Download or save"):
        AutoPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("numbers", [(0.0, 200.0), (-1e30, 1.0), (1e30, 1.0), (0.0, 1e30), (0.0, -1e30)])
def test_a_steep_map_is_still_a_probability(numbers: tuple[float, float]) -> None:
    for score in (0.0, -0.1, -1.0, -7.0):
        assert 0.0 <= PlattScaling(*numbers)(score) <= 1.0


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


@pytest.mark.parametrize("policy", [None, "auto", FixedPolicy])
def test_a_guard_of_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"`BaselineGuard` needs an object of a subclass.*got .*Pass a policy"):
        BaselineGuard(policy)


class Unsaved(Policy):
    def choose(self, observation: Observation) -> TreeShape:
        return TreeShape.plain()


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


def test_small_trees_are_used_where_they_cost_less_than_a_plain_step() -> None:
    machine = Machine(lambda nodes: 1.0 if nodes == 1 else 0.8 + 0.03 * nodes, level_seconds=0.02, hit=0.15)
    assert machine.run(BaselineGuard(ThroughputPolicy()), 300) > 1.1


def test_a_forward_that_took_far_less_than_a_smaller_one_did_makes_the_smaller_one_cheaper() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 3.0), (4, 4.0), (8, 4.0), *[(8, 1.5)] * 4):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify_seconds(1) < costs.verify_seconds(4) == costs.verify_seconds(8) < 1.9


def test_what_was_measured_in_a_slow_moment_is_not_thought_dear_afterwards() -> None:
    costs = RunningCosts()
    for speed, nodes in ((1.0, 1), (1.0, 4), (1.0, 8), *[(1.5, 8)] * 20, *[(1.0, 1)] * 12):
        seconds = speed * (1.0 + 0.02 * (nodes - 1))
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify_seconds(1) == pytest.approx(1.0, abs=0.01)
    assert costs.verify_seconds(4) == pytest.approx(1.06, rel=0.15), "nobody measured it then"
    assert costs.verify_seconds(8) == pytest.approx(1.14, rel=0.25), "1.71 in the seconds of then"


def test_an_interruption_of_any_length_changes_what_is_known_by_little() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 1.0), (4, 1.2), (4, 1e6)):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify_seconds(4) < 1.5 and costs.verify_seconds(4) / costs.verify_seconds(1) < 1.3


def test_a_clock_that_jumps_or_stands_still_is_survived() -> None:
    for policy in (ThroughputPolicy(), BaselineGuard(ThroughputPolicy())):
        observation = Observation(torch.full((1, 4), torch.nan), 9, 0, 20, lambda: [0.9, 0.8])
        for seconds in (0.0, -5.0, 1.0, 1e9, 0.0):
            shape = policy.choose(observation)
            policy.observe(
                StepRecord(shape, 0, 1 + shape.lookup, RowCounts([0]), RowCounts([1]), 0.0, seconds, seconds)
            )
        assert isinstance(policy.choose(observation), TreeShape)
