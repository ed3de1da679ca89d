"""The clock of plain steps follows the machine, and a slow moment does not mislead it for long."""

import pytest

from transformers_resps.policies.guard import (
    FAR_POSITIONS,
    MAX_REPRICED_STEPS,
    MAX_TREES_BETWEEN,
    PLAIN_UP,
    START_STEPS,
    ExplorationBudget,
    PlainClock,
)


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
