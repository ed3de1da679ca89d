"""Planted costs and planted heads: the policy must react to each."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.policies.machine import COMPILED, FLAT, JUMPING, SLOPING, Machine
from transformers_resps import ReSpSPolicy
from transformers_resps.drafting.blocks import Branching, best_paths, bounds
from transformers_resps.policies.acceptance_model import AcceptanceModel, PlattScaling
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.auto import default_policy
from transformers_resps.policies.base import Level, Observation, Policy, Trials
from transformers_resps.policies.costs import CostTable, RunningCosts
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.saving import AutoPolicy
from transformers_resps.policies.throughput import ThroughputMemory, ThroughputPolicy, best_prefix
from transformers_resps.replay import OutcomeTable, RankedText, RecordedText, replay_policy
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import CandidatePool, TreeShape


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
    [[[0.0, 1e30]] * 4, [[-1e30, 1.0]] * 4, [[math.nan, 1.0]] * 4, [[0.1, 0.9, 1.0]] * 4, [0.1], None],
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


# Nodes that were looked up and nodes of the head compete for the places of one tree.
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


# Looking for repetitions takes time, too: where they are rare it is done rarely.
PLAIN_SECONDS = 0.008


class Text:
    """Plain steps of a text that is decoded without a head; asking what it repeats takes `look_seconds`."""

    def __init__(self, look_seconds: float) -> None:
        self.policy, self.look_seconds = ThroughputPolicy(), look_seconds
        self.probs: list[float] = []  # of what is found
        self.looks: list[bool] = []  # of each step, whether it asked

    def step(self) -> TreeShape:
        looks = len(self.looks)
        shape = self.policy.choose(Observation(None, 100 + looks, looks, 200, self._look, can_draft=False))
        has_looked = len(self.looks) > looks
        self.looks = [*self.looks[:looks], has_looked]
        found, draft = shape.lookup, self.look_seconds * has_looked
        emitted, seconds = RowCounts([1 + found]), PLAIN_SECONDS * (1 + 0.02 * found)
        record = StepRecord(
            shape, found, 1 + found, RowCounts([found]), emitted, draft, seconds, seconds + draft, RowCounts([0])
        )
        self.policy.observe(record)
        return shape

    def _look(self) -> list[float]:
        self.looks.append(True)
        return self.probs


def test_a_text_without_repetitions_is_looked_up_ever_more_rarely() -> None:
    text = Text(look_seconds=0.0004)
    for _ in range(400):
        text.step()
    assert all(text.looks[1:50])
    assert sum(text.looks[-80:]) == 10


def test_repetitions_that_begin_late_are_found_and_then_looked_up_at_every_step() -> None:
    text = Text(look_seconds=0.0004)
    for _ in range(400):
        text.step()
    text.probs = [0.9, 0.81, 0.7, 0.6]
    lookups = [text.step().lookup for _ in range(40)]
    assert any(lookups[:8]) and all(lookups[-20:])


def test_looks_that_cost_nothing_are_never_left_out() -> None:
    text = Text(look_seconds=0.0)
    for _ in range(400):
        text.step()
    assert all(text.looks[1:])


def test_an_interrupted_look_counts_little() -> None:
    costs = RunningCosts()
    for number in range(30):
        costs.add(1, 0, PLAIN_SECONDS, 0.2 if number == 20 else 0.0004, 0.3, has_looked=True)
    assert costs.look_seconds == costs.copy().look_seconds == pytest.approx(0.0004, rel=0.1)


def test_what_does_not_pay_is_tried_ever_more_rarely_until_it_does() -> None:
    trials = Trials(2, 8)
    assert [number for number in range(40) if trials.is_due(pays=False)] == [1, 5, 13, 21, 29, 37]
    assert trials.is_due(pays=True)
    assert [trials.is_due(pays=False) for _ in range(2)] == [False, True]


# What a second is worth, and when a head that does not pay is asked again.
def step(emitted: int, seconds: float) -> StepRecord:
    return StepRecord(TreeShape.plain(), 0, 1, RowCounts([emitted - 1]), RowCounts([emitted]), 0.0, seconds, seconds)


def test_the_rate_is_that_of_the_text_so_far_between_one_and_two_plain_rates() -> None:
    memory = ThroughputMemory()
    for _ in range(10):
        memory.add(step(3, 2.0))
    assert memory.rate(plain_seconds=1.0) == pytest.approx(1.5)
    assert memory.rate(plain_seconds=0.5) == 2.0, "at least a plain step's"
    assert memory.rate(plain_seconds=2.0) == 1.0, "at most twice as much"


def without_gain(*, head_was_right: bool = True) -> ThroughputMemory:
    memory = ThroughputMemory()
    memory.head_was_right = head_was_right
    for _ in range(30):
        memory.note_draft(0.0, 0.1, 0.0)
    return memory


@pytest.mark.parametrize("lookup_hit", [0.0, 0.3])
def test_a_head_that_does_not_pay_is_probed_ever_more_rarely(lookup_hit: float) -> None:
    """Beside a lookup that is rarely right, too: a batch of texts has one at nearly every step."""
    memory, asked = without_gain(), []
    for number in range(400):
        if memory.asks_head(lookup_hit):
            asked.append(number)
            memory.note_draft(0.0, 0.1, lookup_hit)
    waits = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert waits == sorted(waits) and waits[-4:] == [32, 64, 128, 128]


def test_no_probe_is_made_beside_a_likely_lookup() -> None:
    memory = without_gain()
    assert not any(memory.asks_head(0.5) for _ in range(300))


def test_a_head_that_pays_alone_is_asked_as_far_as_the_lookup_leaves_enough() -> None:
    memory = ThroughputMemory()
    for _ in range(30):
        memory.note_draft(0.4 * (1 - 0.2), 0.2, 0.2)  # 0.4 without the lookup
    assert all(memory.asks_head(hit) is (hit < 0.5) for hit in (0.0, 0.4, 0.45, 0.55, 0.9))
    for _ in range(300):
        memory.asks_head(0.9)
    assert memory.asks_head(0.0), "once the lookup fails"


def test_a_head_that_was_right_is_asked_though_it_does_not_pay_after_steps_it_was_wrong_in() -> None:
    memory = without_gain(head_was_right=False)
    assert not all(memory.asks_head(0.0) for _ in range(5))
    memory.head_was_right = True
    assert all(memory.asks_head(0.0) for _ in range(5))


def test_a_first_draft_that_was_interrupted_does_not_end_asking() -> None:
    """It took fifteen times as long as those that follow."""
    memory = ThroughputMemory()
    for price in (3.0, 0.2, 0.2, 0.2):
        assert memory.asks_head(0.0)
        memory.note_draft(0.9, price, 0.0)


# Off the CPU `auto` chooses the depth before it drafts, so that nothing is read between two levels.
AWAY = "meta"  # any device but the CPU
TOKENS = 192


class Moody(Machine):
    """Its head is good or bad from one step to the next, and says so: what growing level by level is best at."""

    moods: tuple[float, ...]

    def _step(self, policy: Policy, step: int, room: int) -> StepRecord:
        self.hit = self.claimed = self.generator.choice(self.moods)
        return super()._step(policy, step, room)


def speed(verify: float, level: float, moods: tuple[float, ...], device: str) -> float:
    total = 0.0
    for seed in range(4):
        machine = Moody(verify, level, 0.5, seed=seed, device=device)
        machine.moods = moods
        policy = default_policy()
        machine.write(policy, 2 * TOKENS)  # finds out
        total += sum(machine.write(policy, TOKENS) for _ in range(4))
    return total


@pytest.mark.parametrize("level", [0.01, 0.03])  # of a plain step, as on accelerators
@pytest.mark.parametrize("verify", [0.001, 0.02])
@pytest.mark.parametrize(
    ("moods", "share"), [((0.6,), 0.97), ((0.85,), 0.97), ((0.1, 0.3), 0.97), ((0.35, 0.9), 0.92)]
)
def test_choosing_the_depth_beforehand_loses_little_against_growing(
    verify: float, level: float, moods: tuple[float, ...], share: float
) -> None:
    assert speed(verify, level, moods, AWAY) >= share * speed(verify, level, moods, "cpu")


@pytest.mark.parametrize("hit", [0.0, 0.05])
@pytest.mark.parametrize("tokens", [48, 512])
def test_a_head_that_is_never_right_costs_next_to_nothing(hit: float, tokens: int) -> None:
    for verify, level in ((0.02, 0.02), (0.2, 0.1)):
        machine = Machine(verify, level, hit, claimed=0.9, device=AWAY)
        assert machine.write(default_policy(), tokens) >= 0.97


class Asked(ThroughputPolicy):
    """Must not be asked between levels."""

    def grow(self, level: Level) -> bool:
        raise AssertionError(f"asked after level {level.depth}")


def test_off_the_cpu_no_policy_is_asked_between_levels() -> None:
    for verify in (FLAT, SLOPING):
        machine = Machine(verify, 0.001, 0.8, device=AWAY)
        assert machine.write(BaselineGuard(Asked()), 128) > 1.5
        assert max(shape.depth for shape in machine.shapes) == 8


def test_policies_that_decide_beforehand_say_so() -> None:
    fixed = FixedPolicy(TreeShape(8, 3, 2))
    assert not fixed.grows and not BaselineGuard(fixed).grows and not ReSpSPolicy.grows
    assert BaselineGuard(ThroughputPolicy()).grows
    policy = ThroughputPolicy()
    for device, grows in ((AWAY, False), ("cpu", True)):
        policy.costs.add(1, 1, 1.0, 0.1, 1.1)
        policy.choose(Observation(torch.zeros(1, 4), 10, 3, 50, list, device_type=device))
        assert policy.grows is grows


# Over a block head `auto` chooses depth and nodes after the pass, as well as the best fixed tree does beforehand.
TEXT_TOKENS, MOST, TOP_K, LEVELS = 400, 16, 3, 8
SHARES = torch.tensor([0.6, 0.2])  # of what the likeliest token leaves, by rank
GRID = ActionGrid(
    tuple(
        TreeShape(nodes, depth, top_k)
        for depth in range(1, LEVELS + 1)
        for nodes in (2, 3, 4, 5, 6, 8, 10, 12, 14, 17)
        for top_k in (1, TOP_K)
        if depth <= nodes - 1 <= (depth if top_k == 1 else MOST)
    )
)
MACHINES = {  # seconds of a verification, by nodes, and of a draft
    "bf16": ({nodes: SLOPING(nodes) for nodes in (1, 2, 4, 8, 12, 17)}, 0.003),
    "compiled": ({nodes: COMPILED(nodes) for nodes in (1, 2, 4, 6, 8, 12, 17)}, 0.0015),
    "GPU": ({1: 0.020, 2: 0.0202, 17: 0.0207}, 0.002),
}
HONESTY = torch.tensor([0.97, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])  # of each slot: how often it is right of its claims


def text_of(seed: int) -> RecordedText:
    """A text, and blocks whose slots are guessed apart: one row serves all nodes of a level.

    On a path that is right so far, a token is right as often as it claims, times the `HONESTY` of its level.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 1000, (TEXT_TOKENS + LEVELS + 2,), generator=generator)
    sure = 0.98 * torch.rand(TEXT_TOKENS, 1, generator=generator) ** 0.5  # some places are hard, for all their slots
    claims = (sure * (0.8 + 0.2 * torch.rand(TEXT_TOKENS, LEVELS, generator=generator)))[..., None]
    claims = torch.cat([claims, (1 - claims) * SHARES], dim=-1).sort(-1, descending=True).values  # [t, D, k]
    drawn = torch.rand(TEXT_TOKENS, LEVELS, 1, generator=generator)
    ranks = (drawn > (claims * HONESTY[:, None]).cumsum(-1)).sum(-1)  # of the text's own token, or none
    wrong = 1000 + torch.arange(TEXT_TOKENS * LEVELS * TOP_K).view(TEXT_TOKENS, LEVELS, TOP_K)
    own = tokens.unfold(0, LEVELS, 1)[2 : 2 + TEXT_TOKENS, :, None]
    children = torch.where(torch.arange(TOP_K) == ranks[..., None], own, wrong)

    def pool(top_k: int) -> CandidatePool:
        shape, scores = TreeShape(MOST + 1, LEVELS, top_k), claims.log()[:, :, None, :top_k]
        branching = Branching(children[..., :top_k], lambda level, chosen, state: (scores[:, level], state))
        return best_paths(branching, bounds(shape, TEXT_TOKENS, tokens.device)[0], LEVELS).pool(shape)

    pools = {top_k: pool(top_k) for top_k in (1, TOP_K)}
    return RecordedText(
        tokens[: TEXT_TOKENS + 2], 1, torch.zeros(TEXT_TOKENS, 2), pools, spare_room=100, block_nodes=MOST
    )


@pytest.fixture(scope="module")
def texts() -> list[RecordedText]:
    return [text_of(seed) for seed in range(8)]


@pytest.fixture(scope="module")
def ranked(texts: list[RecordedText]) -> list[RankedText]:
    return [RankedText.from_recording(text) for text in texts]


@pytest.mark.parametrize("machine", MACHINES)
def test_auto_is_as_fast_as_the_best_fixed_depth_and_budget(
    machine: str, texts: list[RecordedText], ranked: list[RankedText]
) -> None:
    """That of the first texts, on the others. With one factor for all levels, or nodes ranked as the head has them, it
    is 2 to 3% slower."""
    verify, draft = MACHINES[machine]
    table = CostTable({128: verify}, {1: 0.0}, {}, 0.0003, draft_start={1: draft})
    searched, held_out = (
        OutcomeTable([text.outcomes(GRID, table) for text in part]) for part in (ranked[:4], ranked[4:])
    )
    policy = BaselineGuard(ThroughputPolicy(depth=4, top_k=TOP_K, most_nodes=MOST))
    replay_policy(texts[0], policy, table)
    own = sum(replay_policy(text, policy, table).seconds for text in texts[4:])
    assert own <= 1.02 * float(held_out.fixed_seconds[:, searched.best_fixed].sum())


def test_a_block_is_priced_as_a_whole_and_drafted_whole(texts: list[RecordedText]) -> None:
    """The first draft does not tell what a level costs, so that none is left out for its price."""
    policy = ThroughputPolicy(depth=4, top_k=TOP_K, most_nodes=MOST)
    table = CostTable({128: {1: 1.0, 64: 1.1}}, {1: 0.0}, {}, draft_start={1: 0.4})
    steps = replay_policy(texts[0], BaselineGuard(policy), table).steps
    assert {step.shape.depth for step in steps if step.shape.asks_head} == {LEVELS}
    assert policy.costs.draft_seconds(TOP_K, 1) == pytest.approx(0.4)
