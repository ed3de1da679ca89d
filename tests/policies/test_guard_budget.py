"""The exploration budget keeps its bound, whatever the steps lose and gain."""

import random

import pytest

from transformers_resps.policies.guard import (
    CONFIDENT_STEPS,
    FAR_POSITIONS,
    MAX_CARRIED_STEPS,
    MAX_EARNED_STEPS,
    MAX_REPRICED_STEPS,
    MAX_TREES_BETWEEN,
    PLAIN_UP,
    SHARE,
    START_STEPS,
    TRIAL_STEPS,
    ExplorationBudget,
    PlainClock,
    RowProgress,
)
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import TreeShape


PLAIN = 0.02  # seconds of a plain step


def lost_in_a_call(budget: ExplorationBudget, tokens: int, generator: random.Random, *, is_confident: bool) -> float:
    """Plain steps that a call loses whose every drafted step has its worst outcome, and costs what it may or less."""
    budget.begin_call(PLAIN)
    lost = 0.0
    for written in range(tokens):
        limits = budget.limits(
            tokens - written, PLAIN, is_confident=is_confident, probes_head=generator.random() < 0.5
        )
        most = generator.choice([limits.total, limits.tree])
        cost = 0.0
        if most > 0.0 and generator.random() < 0.5:
            cost = most * generator.random()
            budget.seconds -= cost
        lost += cost
        budget.end_step(PLAIN, PLAIN)
    return lost / PLAIN


@pytest.mark.parametrize("tokens", [1, 10, 100, 1000])
@pytest.mark.parametrize(("is_confident", "more"), [(False, 0.0), (True, CONFIDENT_STEPS)])
def test_a_call_of_worst_outcomes_loses_no_more_than_the_bound(tokens: int, is_confident: bool, more: float) -> None:
    bound = START_STEPS + TRIAL_STEPS + SHARE * tokens + more
    for seed in range(50):
        budget, generator = ExplorationBudget(), random.Random(seed)
        for _ in range(3):
            assert lost_in_a_call(budget, tokens, generator, is_confident=is_confident) <= bound + 1e-9


def test_the_bound_is_used_up_by_a_drafter_that_takes_all_it_may() -> None:
    budget, lost = ExplorationBudget(), 0.0
    budget.begin_call(PLAIN)
    for left in range(1000, 500, -1):
        most = max(budget.limits(left, PLAIN, is_confident=False, probes_head=False).total, 0.0)
        budget.seconds -= most
        lost += most
        budget.end_step(PLAIN, PLAIN)
    assert lost / PLAIN == pytest.approx(START_STEPS + TRIAL_STEPS + SHARE * 499)


def test_what_drafting_won_may_be_lost_up_to_a_limit_and_less_of_it_in_the_next_call() -> None:
    budget = ExplorationBudget()
    budget.seconds += 100 * PLAIN
    budget.end_step(PLAIN, PLAIN)
    assert budget.seconds == pytest.approx(MAX_EARNED_STEPS * PLAIN)
    budget.begin_call(PLAIN)
    assert budget.seconds == pytest.approx(MAX_CARRIED_STEPS * PLAIN)


def test_the_next_call_forgives_losses() -> None:
    budget = ExplorationBudget()
    budget.seconds -= 100 * PLAIN
    budget.begin_call(PLAIN)
    assert budget.seconds == pytest.approx(START_STEPS * PLAIN)


def test_near_the_end_less_may_be_lost() -> None:
    limits = [ExplorationBudget().limits(room, PLAIN, is_confident=True, probes_head=True) for room in (5, 50)]
    assert limits[0].total < limits[1].total and limits[0].lookup < limits[1].lookup


def test_a_policy_that_probes_verifies_no_tree_on_trial() -> None:
    budget = ExplorationBudget()
    probing = budget.limits(500, PLAIN, is_confident=False, probes_head=True)
    other = budget.limits(500, PLAIN, is_confident=False, probes_head=False)
    assert probing.tree == 0.0 < probing.total and other.tree == other.total


@pytest.mark.parametrize(("lost", "left"), [(0.04, -0.06), (0.2, 0.0), (-0.1, -0.1)])
def test_losses_that_plain_steps_would_have_had_are_excused_and_earn_nothing(lost: float, left: float) -> None:
    budget = ExplorationBudget()
    budget.seconds -= 0.1
    budget.excuse(lost)
    assert budget.seconds == pytest.approx(left)


def test_gains_of_an_old_price_are_cut_when_plain_steps_turn_out_cheaper() -> None:
    budget = ExplorationBudget()
    budget.seconds += 10 * PLAIN
    budget.reprice(PLAIN / 2)
    assert budget.seconds == pytest.approx(MAX_REPRICED_STEPS * PLAIN / 2)


# The clock of plain steps follows the machine, and a slow moment does not mislead it for long.
def budget_of(seconds: float = 0.0) -> ExplorationBudget:
    budget = ExplorationBudget()
    budget.seconds = seconds
    return budget


def test_the_first_time_is_taken_as_it_is() -> None:
    clock, budget = PlainClock(), budget_of()
    clock.time(0.5, budget)
    assert clock.seconds == 0.5 and budget.seconds == START_STEPS * 0.5


def test_a_slow_moment_does_not_credit_trees_for_long() -> None:
    """Plain steps of 1, 1.3 for a while, then 1 again: two of them, and trees are credited as before."""
    clock = PlainClock()
    for seconds in (1.0, *[1.3] * 8, 1.0, 1.0):
        clock.time(seconds, budget_of())
    assert clock.seconds < 1.1


def test_an_interruption_counts_as_half_a_step_more() -> None:
    clock = PlainClock(1.0)
    clock.time(50.0, budget_of())
    assert clock.seconds == pytest.approx(1.0 + PLAIN_UP * 0.5)


def test_a_far_cheaper_step_replaces_what_was_known() -> None:
    clock, budget = PlainClock(1.0), budget_of(9.0)
    clock.time(0.5, budget)
    assert clock.seconds == 0.5 and budget.seconds == MAX_REPRICED_STEPS * 0.5, "its gains were overestimated"


def test_a_plain_step_is_due_after_many_trees_and_after_an_outdated_one() -> None:
    clock = PlainClock(1.0)
    for _ in range(MAX_TREES_BETWEEN):
        assert not clock.is_due
        clock.count_tree(1.0)
    assert clock.is_due
    clock.count_plain()
    assert not clock.is_due
    clock.expire()
    assert clock.is_due


@pytest.mark.parametrize(("context", "is_due"), [(100 + FAR_POSITIONS, False), (2000, True)])
def test_a_call_with_a_far_longer_context_times_a_plain_step_again(context: int, is_due: bool) -> None:
    clock, budget = PlainClock(), budget_of()
    clock.context = 100
    clock.time(1.0, budget)
    clock.begin_call(context)
    assert clock.is_due is is_due
    clock.context = context
    factor = clock.time(1.4, budget)
    assert factor == (1.4 if is_due else 1.0) and budget.seconds == pytest.approx(START_STEPS * factor)
    assert not clock.is_due


def test_trees_of_the_same_call_were_credited_too_little_when_plain_steps_turn_out_slower() -> None:
    clock, budget = PlainClock(1.0), budget_of(-2.0)
    clock.count_tree(3.0)
    clock.time(1.4, budget)
    assert budget.seconds == pytest.approx(3.0 * 0.4 - 2.0)


def test_what_an_earlier_call_gained_is_not_credited_again() -> None:
    clock, budget = PlainClock(1.0), budget_of(-2.0)
    clock.count_tree(50.0)
    clock.begin_call(100)
    clock.time(1.4, budget)
    assert budget.seconds == -2.0


# A call is as far as its slowest row, which may have had some bad luck.
def step(*emitted: int) -> StepRecord:
    accepted = RowCounts(max(count - 1, 0) for count in emitted)
    return StepRecord(TreeShape.plain(), 0, 1, accepted, RowCounts(emitted), 0.0, 1.0, 1.0)


def test_one_row_advances_by_its_tokens() -> None:
    progress = RowProgress()
    assert [progress.add(step(count)) for count in (1, 4, 2)] == [1, 4, 2]


def test_a_lag_of_a_few_tokens_counts_as_bad_luck_and_more_as_slower() -> None:
    progress = RowProgress()
    assert progress.add(step(1, 5)) == 3.0, "the mean"
    assert progress.add(step(1, 5)) == pytest.approx(1.0), "4 tokens: the slowest row's 2, and 2"
    assert progress.add(step(1, 5)) == pytest.approx(1.0)


def test_finished_rows_do_not_count() -> None:
    progress = RowProgress()
    progress.add(step(1, 1))
    assert progress.add(step(3, 0)) == 3 and len(progress.written) == 2


def test_a_new_call_starts_at_nothing() -> None:
    progress = RowProgress()
    progress.add(step(1, 9))
    progress.begin_call()
    assert progress.written == [] and progress.add(step(1, 1)) == 1
