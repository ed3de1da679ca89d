"""Planted costs and planted heads: the policy must react to each, and the guard must never lose."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transformers_resps.policy import (
    AutoPolicy,
    FixedPolicy,
    Guard,
    Level,
    LogisticMap,
    NodeOdds,
    Observation,
    Policy,
    RunningCosts,
    ThroughputPolicy,
    default_policy,
)
from transformers_resps.telemetry import StepRecord
from transformers_resps.tree import TreeShape


class Machine:
    """A fake machine, head and lookup: each level is right with `hit`, each lookup token with `lookup_hit`.

    Args:
        verify: nodes -> seconds of the target's forward, or seconds of each further node where a plain step takes 1.
        level_seconds: of the head.
        hit: what is true; the head claims `claimed`, by default the truth.
    """

    def __init__(
        self,
        verify: Callable[[int], float] | float,
        level_seconds: float,
        hit: float,
        lookup_hit: float = 0.0,
        claimed: float | None = None,
        seed: int = 0,
    ) -> None:
        self.verify = verify if callable(verify) else lambda nodes: 1.0 + verify * (nodes - 1)
        self.level_seconds, self.hit, self.lookup_hit = level_seconds, hit, lookup_hit
        self.claimed = hit if claimed is None else claimed
        self.generator = random.Random(seed)
        self.context = 100
        self.tokens, self.seconds = 0, 0.0
        self.shapes: list[TreeShape] = []
        self.verified: list[int] = []

    def run(self, policy: Policy, steps: int) -> float:
        """One text of so many steps; tokens per second."""
        for step in range(steps):
            policy.observe(self._step(policy, step, 50))
        return self.tokens / self.seconds

    def write(self, policy: Policy, tokens: int) -> float:
        """One text of so many tokens; its speed in those of plain decoding."""
        written, before, step = 0, self.seconds, 0
        while written < tokens:
            record = self._step(policy, step, tokens - written)
            policy.observe(record)
            written, step = written + record.emitted_total, step + 1
        return tokens * self.verify(1) / (self.seconds - before)

    def _step(self, policy: Policy, step: int, room: int) -> StepRecord:
        survival = [self.lookup_hit ** (i + 1) for i in range(8)] if self.lookup_hit else []
        shape = policy.choose(
            Observation(torch.zeros(1, 4), self.context + step, step, room, lambda: survival)
        ).within(room - 1)
        nodes, levels = 1, 0
        if shape.asks_head:
            levels, claim = 1, math.log(self.claimed)
            while levels < shape.depth and policy.grow(Level(levels, torch.full((1, 1), claim * levels))):
                levels += 1
            scores = torch.tensor([[claim * (i + 1) for i in range(levels)]])
            nodes = max(min(policy.size(scores), shape.total_tokens, levels + 1), 1)
        foreseen = self._run_length(self.hit, levels)
        accepted = max(min(foreseen, nodes - 1), self._run_length(self.lookup_hit, shape.lookup))
        verify, draft = self.verify(nodes + shape.lookup), self.level_seconds * levels
        self.tokens += accepted + 1
        self.seconds += verify + draft
        self.shapes.append(shape)
        self.verified.append(nodes + shape.lookup)
        return StepRecord(
            shape,
            levels,
            nodes + shape.lookup,
            accepted,
            accepted + 1,
            draft,
            verify,
            verify + draft,
            min(foreseen, accepted + 1),
        )

    def _run_length(self, hit: float, most: int) -> int:
        length = 0
        while length < most and self.generator.random() < hit:
            length += 1
        return length


def test_free_nodes_and_levels_are_used() -> None:
    machine = Machine(0.0, level_seconds=0.0, hit=0.8)
    assert machine.run(ThroughputPolicy(), 200) > 2.5
    assert sum(machine.verified[50:]) / 150 >= 5


def test_ruinous_nodes_are_not() -> None:
    machine = Machine(3.0, level_seconds=0.0, hit=0.8)
    assert machine.run(Guard(ThroughputPolicy()), 600) > 0.97
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
        assert machine.run(Guard(ThroughputPolicy()), 400) > 1.8


@pytest.mark.parametrize("shape", [TreeShape(60, 8, 10), TreeShape(8, 3, 2), TreeShape(1, 0, 1, lookup=16)])
def test_the_guard_keeps_a_hopeless_drafter_above_097_of_plain(shape: TreeShape) -> None:
    machine = Machine(0.15, level_seconds=0.1, hit=0.01)
    policy = Guard(FixedPolicy(shape))
    assert machine.run(policy, 300) > 0.97
    assert any(not shape.is_plain for shape in machine.shapes[100:]), "it must probe again"


def test_the_guard_costs_a_good_drafter_little() -> None:
    alone = Machine(0.02, 0.02, hit=0.8).run(FixedPolicy(TreeShape(6, 5, 1)), 500)
    guarded = Machine(0.02, 0.02, hit=0.8).run(Guard(FixedPolicy(TreeShape(6, 5, 1))), 500)
    assert guarded > 0.9 * alone


@pytest.mark.parametrize("hit", [0.4, 0.7])
@pytest.mark.parametrize("longer", [1.6, 2.5, 4.0])
def test_a_longer_text_is_not_measured_by_the_plain_steps_of_shorter_ones(hit: float, longer: float) -> None:
    ratios = []
    for seed in range(6):
        machine, policy = Machine(0.05, 0.05, hit=hit, seed=seed), default_policy()
        short = [machine.write(policy, 128) for _ in range(4)][-1]
        machine.context, machine.verify = 2000, lambda nodes: longer * (1.0 + 0.05 * (nodes - 1))
        ratios.append(machine.write(policy, 96) / short)
    assert sum(ratios) / len(ratios) > 0.95


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


def test_the_guard_notices_when_a_head_stops_being_right() -> None:
    machine = Machine(0.1, 0.1, hit=0.8)
    policy = Guard(FixedPolicy(TreeShape(6, 5, 1)))
    machine.run(policy, 100)
    machine.hit = 0.0
    machine.tokens, machine.seconds = 0, 0.0
    assert machine.run(policy, 300) > 0.94


def _between(row: dict[int, float]) -> Callable[[int], float]:
    known = sorted(row)

    def seconds(nodes: int) -> float:
        place = min(max(sum(count < nodes for count in known), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        return row[low] + (nodes - low) / (high - low) * (row[high] - row[low])

    return seconds


# Measured: SmolLM2 in fp32 on two Zen 3 cores, and in bf16 with AVX-512 (DESIGN.md, section 6).
JUMPING = _between({1: 0.057, 2: 0.098, 4: 0.094, 8: 0.099, 12: 0.120, 16: 0.127, 32: 0.178, 60: 0.248})
SLOPING = _between({1: 0.024, 8: 0.029, 16: 0.034, 32: 0.043, 64: 0.068})
FLAT = _between({1: 0.020, 64: 0.021})
MACHINES = {"flat": (FLAT, 0.001), "sloping": (SLOPING, 0.003), "jumping": (JUMPING, 0.005), "slow": (JUMPING, 0.008)}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("hit", "claimed"), [(0.001, 0.02), (0.001, 0.6), (0.12, 0.5), (0.3, 0.4)])
@pytest.mark.parametrize("tokens", [16, 48, 96, 256])
def test_no_answer_of_a_bad_head_is_slower_than_097_of_plain(
    machine: str, hit: float, claimed: float, tokens: int
) -> None:
    """A random head, one that is sure of itself, one of another domain, a weak one; each call the first ever."""
    verify, level = MACHINES[machine]
    for seed in range(2):
        assert Machine(verify, level, hit, claimed=claimed, seed=seed).write(default_policy(), tokens) >= 0.97


def fitted() -> Guard:
    """As loaded: it knows a head, and no machine."""
    return Guard(ThroughputPolicy(odds=NodeOdds([LogisticMap(0.1, 0.9)] * 4)))


def test_a_fitted_policy_need_not_find_out_whether_the_head_is_any_good() -> None:
    first_trees = []
    for make in (fitted, default_policy):
        machine = Machine(*MACHINES["sloping"], hit=0.6)
        machine.write(make(), 128)
        first_trees.append(next(step for step, nodes in enumerate(machine.verified) if nodes > 1))
    assert first_trees[0] < first_trees[1]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("tokens", [96, 256])
def test_a_fitted_policy_with_a_head_that_has_nothing_to_say_here_loses_little(machine: str, tokens: int) -> None:
    verify, level = MACHINES[machine]
    for seed in range(4):
        assert Machine(verify, level, 0.01, claimed=0.6, seed=seed).write(fitted(), tokens) >= 0.97


@pytest.mark.parametrize("machine", MACHINES)
def test_a_bad_lookup_is_no_loss_either(machine: str) -> None:
    verify, level = MACHINES[machine]
    for tokens in (16, 48, 96, 512):
        assert Machine(verify, level, 0.01, lookup_hit=0.2, claimed=0.1).write(default_policy(), tokens) >= 0.97


def test_what_was_learned_stays_between_calls_and_comes_near_the_best_fixed_chain() -> None:
    for verify, level, share in ((FLAT, 0.001, 0.9), (SLOPING, 0.003, 0.85), (JUMPING, 0.005, 0.8)):
        fixed = max(
            Machine(verify, level, 0.75).run(FixedPolicy(TreeShape(levels + 1, levels, 1)), 1500)
            for levels in range(1, 6)
        )
        machine, policy = Machine(verify, level, 0.75, claimed=0.8), default_policy()
        first = machine.write(policy, 96)
        rates = [machine.write(policy, 96) for _ in range(10)]
        assert sum(rates) / len(rates) > max(first, 1.0), "the first call had to find out"
        assert sum(rates) / len(rates) >= share * fixed * verify(1)


def test_a_glance_costs_one_level_and_no_tree() -> None:
    machine = Machine(JUMPING, 0.005, hit=0.2, claimed=0.2)
    machine.write(default_policy(), 96)
    glances = [nodes for shape, nodes in zip(machine.shapes, machine.verified, strict=True) if shape.asks_head]
    assert glances[:4] == [1] * 4, "first it looks"
    assert sum(nodes > 1 for nodes in glances) <= 2, "one tree tells what trees cost here; the odds say the rest"


def test_a_head_that_claims_too_much_is_believed_less_with_every_outcome() -> None:
    odds = NodeOdds()
    before = odds.of([math.log(0.6)], 1)[0]
    assert before == pytest.approx(0.6)
    for _ in range(60):
        odds.learn([odds.of([math.log(0.6)], 1)[0]], foreseen=0, emitted=1)
    assert odds.of([math.log(0.6)], 1)[0] < 0.12
    for _ in range(200):
        odds.learn([odds.of([math.log(0.3)], 1)[0]], foreseen=1, emitted=1)
    assert odds.of([math.log(0.3)], 1)[0] > 0.85, "and one that claims too little, more"


def test_what_follows_the_steps_own_tokens_is_no_evidence() -> None:
    odds = NodeOdds()
    odds.learn([0.5, 0.3], foreseen=1, emitted=1)
    assert odds.hit_rate(2) == NodeOdds().hit_rate(2) and odds.hit_rate(1) > NodeOdds().hit_rate(1)


def test_a_fitted_policy_is_saved_with_its_guard_and_loaded_by_type(tmp_path: Path) -> None:
    maps = [LogisticMap(-0.3, 0.8), LogisticMap(0.1, 0.7), LogisticMap(), LogisticMap(0.0, 0.5)]
    policy = Guard(ThroughputPolicy(depth=4, top_k=2, most_nodes=9, odds=NodeOdds(maps)))
    policy.save_pretrained(tmp_path)
    loaded = AutoPolicy.from_pretrained(tmp_path)
    assert isinstance(loaded, Guard) and isinstance(loaded.policy, ThroughputPolicy)
    assert loaded.to_config() == policy.to_config()
    scores = [-0.1, -1.0, -3.0]
    for level in range(1, 6):
        assert loaded.policy.odds.of(scores, level) == pytest.approx(policy.policy.odds.of(scores, level))
    with pytest.raises(ValueError, match="guarded Unsaved, but only policies with `save_pretrained`.*Subclass"):
        Guard(Unsaved()).save_pretrained(tmp_path)


class Unsaved(Policy):
    def choose(self, observation: Observation) -> TreeShape:
        return TreeShape.plain()


def test_costs_are_interpolated_and_never_fall_with_more_nodes() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 1.0), (2, 1.9), (8, 1.6), (16, 2.0)):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify(2) == costs.verify(8) == 1.9, "measured here: two nodes can cost more than eight"
    assert costs.verify(12) == pytest.approx(1.95)
    assert costs.verify(24) > costs.verify(16)


def test_a_forward_that_took_far_less_than_a_smaller_one_did_makes_the_smaller_one_cheaper() -> None:
    costs = RunningCosts()
    for nodes, seconds in ((1, 3.0), (8, 4.0), (8, 1.5), (8, 1.5)):
        costs.add(nodes, 0, seconds, 0.0, seconds)
    assert costs.verify(1) == costs.verify(8) < 2.2


def test_a_clock_that_jumps_or_stands_still_is_survived() -> None:
    for policy in (ThroughputPolicy(), Guard(ThroughputPolicy())):
        observation = Observation(torch.full((1, 4), torch.nan), 9, 0, 20, lambda: [0.9, 0.8])
        for seconds in (0.0, -5.0, 1.0, 1e9, 0.0):
            shape = policy.choose(observation)
            policy.observe(StepRecord(shape, 0, 1 + shape.lookup, 0, 1, 0.0, seconds, seconds))
        assert isinstance(policy.choose(observation), TreeShape)


def slowed(factor: float) -> Callable[[int], float]:
    return lambda nodes: factor * (1.0 + 0.1 * (nodes - 1))


@pytest.mark.parametrize(
    "before", [slowed(2.0), slowed(3.3), lambda nodes: 3.3 + 0.02 * (nodes - 1)], ids=["twice", "batch of 8", "flat"]
)
def test_the_guard_notices_that_plain_steps_have_become_cheaper(before: Callable[[int], float]) -> None:
    """A batch of eight, then one row; or a machine that was busy."""
    machine, policy = Machine(before, level_seconds=0.05, hit=0.8), Guard(ThroughputPolicy())
    machine.write(policy, 300)
    machine.verify, machine.hit = slowed(1.0), 0.01
    assert machine.write(policy, 96) > 0.95


def test_first_steps_that_are_slow_do_not_make_trees_look_free() -> None:
    machine, policy = Machine(slowed(5.0), level_seconds=0.05, hit=0.01, claimed=0.8), Guard(ThroughputPolicy())
    machine.write(policy, 2)
    machine.verify = slowed(1.0)
    assert machine.write(policy, 96) > 0.95


def test_a_guarded_policy_that_chooses_no_shape_is_named() -> None:
    class Odd(Policy):
        def choose(self, observation: Observation) -> TreeShape:
            return (8, 4, 2)  # type: ignore[return-value]

    guard, machine = Guard(Odd()), Machine(0.1, 0.1, 0.5)
    with pytest.raises(ValueError, match=r"Odd.* chose \(8, 4, 2\), but a step needs a TreeShape"):
        machine.run(guard, 2)
