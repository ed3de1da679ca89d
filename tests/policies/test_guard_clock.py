"""The clock of plain steps follows the machine, and a slow moment does not mislead it for long."""

import pytest

from transformers_resps.policies.guard import FAR_POSITIONS, MAX_TREES_BETWEEN, PLAIN_UP, PlainChange, PlainClock


def test_the_first_time_is_taken_as_it_is() -> None:
    clock = PlainClock()
    assert clock.time(0.5).change is PlainChange.FIRST and clock.seconds == 0.5


def test_a_slow_moment_does_not_credit_trees_for_long() -> None:
    """Plain steps of 1, 1.3 for a while, then 1 again: two of them, and trees are credited as before."""
    clock = PlainClock()
    for seconds in (1.0, *[1.3] * 8, 1.0, 1.0):
        clock.time(seconds)
    assert clock.seconds < 1.1


def test_an_interruption_counts_as_half_a_step_more() -> None:
    clock = PlainClock(1.0)
    clock.time(50.0)
    assert clock.seconds == pytest.approx(1.0 + PLAIN_UP * 0.5)


def test_a_far_cheaper_step_replaces_what_was_known() -> None:
    clock = PlainClock(1.0)
    assert clock.time(0.5).change is PlainChange.CHEAPER and clock.seconds == 0.5


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
    clock = PlainClock()
    clock.begin_step(100)
    clock.time(1.0)
    clock.begin_call(context)
    assert clock.is_due is is_due
    clock.begin_step(context)
    timing = clock.time(1.4)
    assert (timing.change is PlainChange.MOVED) is is_due and timing.factor == (1.4 if is_due else 1.0)
    assert not clock.is_due


def test_trees_of_the_same_call_were_credited_too_little_when_plain_steps_turn_out_slower() -> None:
    clock = PlainClock(1.0)
    clock.count_tree(3.0)
    assert clock.time(1.4).excess == pytest.approx(3.0 * 0.4)


def test_what_an_earlier_call_gained_is_not_credited_again() -> None:
    clock = PlainClock(1.0)
    clock.count_tree(50.0)
    clock.begin_call(100)
    assert clock.time(1.4).excess == 0.0
