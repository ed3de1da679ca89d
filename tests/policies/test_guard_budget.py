"""The exploration budget keeps its bound, whatever the steps lose and gain."""

import random

import pytest

from transformers_resps.policies.guard import (
    CONFIDENT_STEPS,
    MAX_CARRIED_STEPS,
    MAX_EARNED_STEPS,
    MAX_REPRICED_STEPS,
    SHARE,
    START_STEPS,
    TRIAL_STEPS,
    ExplorationBudget,
)


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
