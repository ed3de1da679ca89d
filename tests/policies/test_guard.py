"""The guard must never lose, whatever the machine, the head and the policy."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.policies.machine import COMPILED, JUMPING, MACHINES, SLOPING, Machine
from tests.policies.rows import observation, record
from transformers_resps.policies.acceptance_model import AcceptanceModel, PlattScaling
from transformers_resps.policies.auto import default_policy
from transformers_resps.policies.base import Observation, Policy, count_nodes
from transformers_resps.policies.costs import RunningCosts
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.policies.guard import BaselineGuard, HeadAccount
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.telemetry import RowCounts, SpeculationReport, StepRecord
from transformers_resps.tree import Pricing, TreeShape


@pytest.mark.parametrize("shape", [TreeShape(60, 8, 10), TreeShape(8, 3, 2), TreeShape(1, 0, 1, lookup=16)])
def test_the_guard_keeps_a_hopeless_drafter_above_097_of_plain(shape: TreeShape) -> None:
    machine = Machine(0.15, level_seconds=0.1, hit=0.01)
    policy = BaselineGuard(FixedPolicy(shape))
    assert machine.run(policy, 300) > 0.97
    assert any(not shape.is_plain for shape in machine.shapes[100:]), "it must probe again"


def test_the_guard_costs_a_good_drafter_little() -> None:
    alone = Machine(0.02, 0.02, hit=0.8).run(FixedPolicy(TreeShape(6, 5, 1)), 500)
    guarded = Machine(0.02, 0.02, hit=0.8).run(BaselineGuard(FixedPolicy(TreeShape(6, 5, 1))), 500)
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


def test_the_guard_notices_when_a_head_stops_being_right() -> None:
    machine = Machine(0.1, 0.1, hit=0.8)
    policy = BaselineGuard(FixedPolicy(TreeShape(6, 5, 1)))
    machine.run(policy, 100)
    machine.hit = 0.0
    machine.tokens, machine.seconds = 0, 0.0
    assert machine.run(policy, 300) > 0.94


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


def fitted() -> BaselineGuard:
    """As loaded: it knows a head, and no machine."""
    return BaselineGuard(ThroughputPolicy(acceptance=AcceptanceModel([PlattScaling(0.1, 0.9)] * 4)))


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


def test_a_draft_only_probe_costs_one_level_and_no_tree() -> None:
    machine = Machine(JUMPING, 0.005, hit=0.2, claimed=0.2)
    machine.write(default_policy(), 96)
    asked = [nodes for shape, nodes in zip(machine.shapes, machine.verified, strict=True) if shape.asks_head]
    assert asked[:4] == [1] * 4, "it probes first"
    assert sum(nodes > 1 for nodes in asked) <= 2, "one tree tells what trees cost here; the probabilities the rest"


def compiled(hit: float, claimed: float, seed: int, least_nodes: int = 4) -> Machine:
    """A step computes four nodes at least, and a draft of one level takes a quarter of it."""
    return Machine(COMPILED, 0.002, hit, claimed=claimed, seed=seed, start_seconds=0.0013, least_nodes=least_nodes)


@pytest.mark.parametrize(("hit", "least"), [(0.5, 1.05), (0.6, 1.15), (0.7, 1.3)])
def test_nodes_that_a_step_computes_anyway_pay_for_finding_out_about_an_expensive_head(
    hit: float, least: float
) -> None:
    speeds = {
        nodes: [compiled(hit, hit, seed, nodes).write(default_policy(), 96) for seed in range(20)] for nodes in (1, 4)
    }
    assert sum(speeds[4]) / 20 > least and min(speeds[4]) > 0.98
    assert max(speeds[1]) < 1.0, "the machine does not tell that nodes are free, and the budget is spent on drafts"


def test_free_nodes_are_verified_after_bad_luck_as_well() -> None:
    """Else the budget of an unlucky text pays for drafts alone, which earn nothing."""
    assert min(compiled(0.6, 0.6, seed).write(default_policy(), 256) for seed in range(40)) > 1.05


@pytest.mark.parametrize(("hit", "claimed"), [(0.001, 0.02), (0.001, 0.6), (0.12, 0.5), (0.3, 0.4)])
@pytest.mark.parametrize("tokens", [16, 48, 96, 256])
def test_free_nodes_of_a_bad_head_cost_no_more_than_its_drafts(hit: float, claimed: float, tokens: int) -> None:
    for seed in range(10):
        assert compiled(hit, claimed, seed).write(default_policy(), tokens) >= 0.97


def slowed(factor: float) -> Callable[[int], float]:
    return lambda nodes: factor * (1.0 + 0.1 * (nodes - 1))


@pytest.mark.parametrize(
    "before", [slowed(2.0), slowed(3.3), lambda nodes: 3.3 + 0.02 * (nodes - 1)], ids=["twice", "batch of 8", "flat"]
)
def test_the_guard_notices_that_plain_steps_have_become_cheaper(before: Callable[[int], float]) -> None:
    """A batch of eight, then one row; or a machine that was busy."""
    machine, policy = Machine(before, level_seconds=0.05, hit=0.8), BaselineGuard(ThroughputPolicy())
    machine.write(policy, 300)
    machine.verify, machine.hit = slowed(1.0), 0.01
    assert machine.write(policy, 96) > 0.95


def test_first_steps_that_are_slow_do_not_make_trees_look_free() -> None:
    machine, policy = (
        Machine(slowed(5.0), level_seconds=0.05, hit=0.01, claimed=0.8),
        BaselineGuard(ThroughputPolicy()),
    )
    machine.write(policy, 2)
    machine.verify = slowed(1.0)
    assert machine.write(policy, 96) > 0.95


@pytest.mark.parametrize(("slope", "least"), [(1.0, 0.965), (3.0, 0.9), (10.0, 0.75)])
@pytest.mark.parametrize("lookup_hit", [0.0, 0.7])
def test_where_nodes_are_ruinous_one_tree_of_two_tells(slope: float, least: float, lookup_hit: float) -> None:
    for tokens in (32, 96):
        machine = Machine(slope, 0.05, hit=0.7, lookup_hit=lookup_hit)
        assert machine.write(default_policy(), tokens) >= least
        assert max(machine.verified) <= 2 or slope < 1.2


def test_trees_grow_by_doubling_at_most_until_their_costs_are_known() -> None:
    machine = Machine(0.02, 0.02, hit=0.8)
    machine.write(BaselineGuard(FixedPolicy(TreeShape(6, 5, 1))), 200)
    trees = [nodes for nodes in machine.verified if nodes > 1]
    assert trees[0] == 2 and max(trees) == 6
    assert all(nodes <= 2 * max(trees[:place]) for place, nodes in enumerate(trees) if place)


def test_a_row_that_runs_ahead_does_not_pay_for_one_that_drafts_do_not_help() -> None:
    """The call ends with the slower row. A tree costs half a plain step more; a third row has ended long ago."""
    guard, seconds, written, step = BaselineGuard(FixedPolicy(TreeShape(4, 3, 1))), 0.0, 0, 0
    while written < 96:
        shape = guard.choose(Observation(torch.zeros(3, 4), 100 + step, step, 96 - written, list, row_count=3))
        nodes = (
            1
            if shape.is_plain
            else min(*count_nodes(guard, torch.zeros(3, 3), torch.arange(1, 4)), shape.total_tokens)
        )
        cost = 1.0 + 0.5 * (nodes > 1)
        emitted = (min(nodes, 4), 1, 0)
        accepted = tuple(max(count - 1, 0) for count in emitted)
        guard.observe(StepRecord(shape, nodes - 1, nodes, RowCounts(accepted), RowCounts(emitted), 0, cost, cost))
        seconds, written, step = seconds + cost, written + 1, step + 1
    assert 96 / seconds >= 0.97


class Interrupted:
    """One forward in fifty takes five times as long: `excess` holds the seconds that it lost so."""

    def __init__(self, slope: float, seed: int) -> None:
        self.slope, self.generator, self.excess = slope, random.Random(seed), 0.0

    def __call__(self, nodes: int) -> float:
        seconds = 1.0 + self.slope * (nodes - 1)
        lost = 4.0 * seconds * (self.generator.random() < 0.02)
        self.excess += lost
        return seconds + lost


def speed_between_interruptions(policy: Policy, hit: float, tokens: int) -> float:
    """Over twenty texts."""
    written = seconds = 0.0
    for seed in range(20):
        clock = Interrupted(0.04, seed)
        machine = Machine(clock, 0.05, hit, seed=seed)
        machine.write(policy, tokens)
        written, seconds = written + tokens, seconds + machine.seconds - clock.excess
    return written / seconds


@pytest.mark.parametrize("policy", [TreeShape(6, 5, 1), TreeShape(12, 4, 3)])
def test_interruptions_do_not_credit_a_hopeless_drafter(policy: TreeShape) -> None:
    assert speed_between_interruptions(BaselineGuard(FixedPolicy(policy)), 0.02, 128) > 0.97


def test_interruptions_cost_a_good_drafter_little() -> None:
    alone = speed_between_interruptions(FixedPolicy(TreeShape(4, 3, 1)), 0.5, 128)
    assert speed_between_interruptions(BaselineGuard(FixedPolicy(TreeShape(4, 3, 1))), 0.5, 128) > 0.97 * alone


def test_a_call_may_lose_what_it_won() -> None:
    """Bad luck that costs nine plain steps, after more were won: the drafter is still asked afterwards."""
    machine, guard = Machine(0.04, 0.05, hit=0.7), BaselineGuard(FixedPolicy(TreeShape(4, 3, 1)))
    for hit, steps in ((0.7, 60), (0.0, 34), (0.7, 30)):
        machine.hit, started = hit, len(machine.verified)
        for step in range(steps):
            guard.observe(machine._step(guard, started + step, 96))
    assert sum(nodes > 1 for nodes in machine.verified[64:]) > 55


def test_a_guarded_policy_that_chooses_no_shape_is_named() -> None:
    class Odd(Policy):
        def choose(self, observation: Observation) -> TreeShape:
            return (8, 4, 2)  # type: ignore[return-value]

    guard, machine = BaselineGuard(Odd()), Machine(0.1, 0.1, 0.5)
    with pytest.raises(ValueError, match=r"Odd.* returned \(8, 4, 2\) from `choose`. Return a `TreeShape`"):
        machine.run(guard, 2)


@pytest.mark.parametrize(("plain", "drafts"), [(1.5, True), (1.0, False)])
def test_losses_are_forgiven_as_far_as_plain_steps_turn_out_to_be_slower_too(plain: float, drafts: bool) -> None:
    """Trees of one and a half tokens, thought to cost 1.1 plain steps, take 1.7 of them until drafting ends."""
    guard = BaselineGuard(FixedPolicy(TreeShape(2, 1, 1)))

    def shape_after(seconds: float) -> TreeShape:
        guard.observe(StepRecord(TreeShape.plain(), 0, 1, RowCounts([0]), RowCounts([1]), 0.0, seconds, seconds))
        return guard.choose(Observation(torch.zeros(1, 4), 100, 1, 96, list))

    guard._own_costs = RunningCosts({1: 1.0, 2: 1.1}, 0.05)
    shape, steps = shape_after(1.0), 0
    while not shape.is_plain:
        guard.observe(StepRecord(shape, 1, 2, RowCounts([steps % 2]), RowCounts([1 + steps % 2]), 0.05, 1.65, 1.7))
        shape, steps = guard.choose(Observation(torch.zeros(1, 4), 100, 1, 96, list)), steps + 1
        assert steps < 20
    assert any([not shape_after(plain).is_plain, not shape_after(plain).is_plain]) is drafts


def test_a_guard_is_not_guarded_once_more_by_a_file() -> None:
    nested = {"policy": {"policy_type": "guard", "policy": {"policy_type": "fixed", "shape": [4, 2, 2, 0]}}}
    with pytest.raises(ValueError, match="holds another guard, but only one is supported"):
        BaselineGuard.from_saved(nested, {})


@pytest.mark.parametrize("policy", [None, "auto", FixedPolicy])
def test_a_guard_of_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"`BaselineGuard` needs an object of a subclass.*got .*Pass a policy"):
        BaselineGuard(policy)


def test_a_tree_drafted_in_one_go_is_priced_by_all_its_levels() -> None:
    """Counted as one level, six would look six times as expensive, and fewer be drafted than are verified."""
    machine = Machine(0.02, level_seconds=0.1, hit=0.75)
    machine.run(BaselineGuard(FixedPolicy(TreeShape(7, 6, 1))), 200)
    assert not [shape for shape in machine.shapes if shape.total_tokens > shape.depth + 1]


@pytest.mark.parametrize(("start", "level"), [(0.5, 0.01), (0.3, 0.0), (0.02, 0.4)])
def test_a_useless_source_of_any_price_costs_little(start: float, level: float) -> None:
    for seed in range(4):
        machine, policy = Machine(0.03, level, 0.01, claimed=0.8, seed=seed, start_seconds=start), default_policy()
        assert min(machine.write(policy, 128) for _ in range(3)) > 0.97


@pytest.mark.parametrize("learns", [True, False])
def test_costs_of_the_policy_are_its_own_to_change(learns: bool) -> None:
    """In a far longer context all steps take twice as long. The guard asks for it and changes nothing itself."""

    class Owner(FixedPolicy):
        costs = RunningCosts({1: 1.0, 4: 1.2}, 0.05) if learns else None

    policy = Owner(TreeShape(4, 3, 1))
    known, guard = policy.costs, BaselineGuard(policy)
    for seconds, context in ((1.0, 100), (2.0, 2000)):
        guard.choose(Observation(torch.zeros(1, 4), context, 0, 96, list))
        guard.observe(StepRecord(TreeShape.plain(), 0, 1, RowCounts([0]), RowCounts([1]), 0.0, seconds, seconds))
    if known is None:
        assert policy.costs is None
    else:
        assert [known.verify_seconds(nodes) for nodes in (1, 4)] == [1.0, 1.2]
        assert policy.costs is not None and policy.costs.verify_seconds(4) == 2.4


PREFILL = StepRecord(TreeShape.plain(), 0, 1, RowCounts([0]), RowCounts([1]), 0.0, 1.0, 1.0)


def test_mostly_plain_steps_are_explained_by_what_trees_cost_here() -> None:
    machine, policy = Machine(0.9, level_seconds=0.1, hit=0.01, lookup_hit=0.2), default_policy()
    machine.run(policy, 60)
    said = policy.explain([PREFILL, *machine.records])
    idle = sum(not record.drafted for record in machine.records)
    assert said is not None and "plain steps here" in said and "the only tree" in said
    assert f"{idle} of 60 steps had nothing worth verifying" in said
    report = SpeculationReport(steps=[PREFILL, *machine.records], reason=said)
    assert str(report).endswith(f". {said}") and report.to_dict()["reason"] == said
    assert policy.explain([PREFILL, *machine.records[:7]]) is None, "seven steps show nothing"


def test_a_head_that_was_only_tested_is_told_by_what_it_guessed() -> None:
    machine, policy = Machine(0.1, 0.1, hit=0.02), default_policy()
    machine.run(policy, 60)
    tests = sum(record.drafted > 0 for record in machine.records)
    said = policy.explain([PREFILL, *machine.records])
    assert (
        said is not None and f"0 of {tests} drafts that were not verified" in said and "so no tree was tried" in said
    )


def test_a_head_that_was_hardly_tested_is_warming_up() -> None:
    machine, policy = Machine(0.1, 0.1, hit=0.02), default_policy()
    machine.run(policy, 60)
    tested, untested = (
        [record for record in machine.records if bool(record.drafted) is is_so] for is_so in (True, False)
    )
    assert policy.explain([PREFILL, *tested[:1], *untested[:9]]) == "Mostly plain: warming up, no tree tried yet."


def test_a_policy_that_drafts_has_nothing_to_explain() -> None:
    machine, policy = Machine(0.02, 0.02, hit=0.8), default_policy()
    machine.run(policy, 100)
    assert policy.explain([PREFILL, *machine.records]) is None
    assert FixedPolicy(TreeShape.plain()).explain([PREFILL, *machine.records]) is None


def test_a_text_in_which_nothing_repeats_is_told_so() -> None:
    machine, policy = Machine(0.02, 0.0, hit=0.0), BaselineGuard(FixedPolicy(TreeShape.plain()))
    machine.run(policy, 20)
    assert policy.explain([PREFILL, *machine.records]) == "Mostly plain: nothing worth verifying was drafted."


# What the guard makes of a batch, whose rows have outcomes and prices of their own.
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


# A head that does not earn what reading prompts takes it is left out of calls, and tried again.
def read_of(account: HeadAccount, calls: int, earned: float, rows: int = 1, seconds: float = 0.1) -> list[bool]:
    """Whether the head reads the prompts of 100 tokens of so many calls, with a hundred tokens each."""
    found = []
    for _ in range(calls):
        reads = account.pays(rows, 100, 100)
        found.append(reads)
        account.begin_call(seconds if reads else None)
        account.tokens, account.earned = 100.0, earned * reads
    return found


def test_a_head_that_earns_too_little_is_left_out_of_twice_as_many_calls_each_time() -> None:
    trials = [number for number, reads in enumerate(read_of(HeadAccount(), 90, earned=0.05)) if reads]
    assert trials == [0, 1, 3, 7, 15, 31, 63]


def test_a_head_that_earns_its_prompts_reads_all_and_one_that_begins_to_is_believed() -> None:
    account = HeadAccount()
    assert all(read_of(account, 20, earned=0.2))
    assert not all(read_of(account, 8, earned=-0.5))
    assert read_of(account, 30, earned=2.0)[-20:] == [True] * 20


def test_what_a_head_earns_is_known_for_each_number_of_rows() -> None:
    account = HeadAccount()
    assert not all(read_of(account, 4, earned=0.0, rows=8))
    assert all(read_of(account, 4, earned=0.2, rows=1))
    assert not all(read_of(account, 4, earned=0.0, rows=8))


def test_room_and_prompt_of_a_call_decide() -> None:
    account = HeadAccount()
    read_of(account, 4, earned=0.2)  # 0.002 seconds a token, and 0.001 to read one
    assert not account.pays(1, 1000, 100)
    assert account.pays(1, 1000, 1000)
    assert not account.pays(1, 100, 10)
    assert account.pays(1, 10, 10)


def test_an_interruption_while_a_prompt_is_read_counts_little() -> None:
    account = HeadAccount()
    read_of(account, 4, earned=0.2)
    read_of(account, 1, earned=0.2, seconds=10.0)
    assert all(read_of(account, 4, earned=0.2))


def test_calls_without_a_head_say_nothing_about_it() -> None:
    account = HeadAccount()
    read_of(account, 4, earned=0.2)
    for _ in range(20):
        account.begin_call(None)
        account.tokens = 100.0
    assert account.pays(1, 100, 100)


@pytest.mark.parametrize("hit", [0.01, 0.7])
def test_prompts_cost_a_useless_head_little_and_a_good_one_reads_them_all(hit: float) -> None:
    machine = Machine(SLOPING, 0.003, hit=hit, claimed=0.5, prompt_seconds=0.1)
    policy = default_policy()
    speeds = [machine.write(policy, 64) for _ in range(40)]
    if hit > 0.5:
        assert all(machine.read) and min(speeds[2:]) > 1.3
    else:
        assert sum(speeds[4:]) / 36 > 0.98 and machine.read[-30:].count(True) <= 3


def test_a_policy_that_needs_a_head_always_has_one_and_a_fixed_one_that_does_not_never() -> None:
    machine = Machine(SLOPING, 0.003, hit=0.01, prompt_seconds=0.1)
    guard = BaselineGuard(FixedPolicy(TreeShape(4, 3, 1)))
    for _ in range(8):
        machine.write(guard, 64)
    assert all(machine.read)
    assert not FixedPolicy(TreeShape(1, 0, 1, lookup=4)).wants_head(1, 100, 64)


def test_a_head_that_is_left_out_is_told() -> None:
    machine, policy = Machine(SLOPING, 0.003, hit=0.01, claimed=0.5, prompt_seconds=0.1), default_policy()
    while not machine.read or machine.read[-1]:
        machine.write(policy, 64)
    assert "gained too little by the head" in str(policy.explain(machine.records[-64:]))
    policy.observe(machine.records[-1])
    policy.choose(observation(1, 0))
    assert "by the head" not in str(policy.explain(machine.records[-64:])), "another call, which has no head"
