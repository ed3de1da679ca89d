"""Probabilities of acceptance follow the outcomes, whatever the head claims."""

import math

import pytest

from transformers_resps.policies.acceptance_model import AcceptanceModel, PlattScaling


def test_scalings_of_fewer_levels_than_are_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match="one scaling for each of 4 levels, got 1. Fill up"):
        AcceptanceModel([PlattScaling()])


def test_a_head_that_claims_too_much_is_believed_less_with_every_outcome() -> None:
    acceptance = AcceptanceModel()
    before = acceptance.probabilities([math.log(0.6)], 1)[0]
    assert before == pytest.approx(0.6)
    for _ in range(60):
        acceptance.learn([acceptance.probabilities([math.log(0.6)], 1)[0]], drafted_match=0, emitted=1)
    assert acceptance.probabilities([math.log(0.6)], 1)[0] < 0.12
    for _ in range(200):
        acceptance.learn([acceptance.probabilities([math.log(0.3)], 1)[0]], drafted_match=1, emitted=1)
    assert acceptance.probabilities([math.log(0.3)], 1)[0] > 0.85, "and one that claims too little, more"


def test_what_follows_the_steps_own_tokens_is_no_evidence() -> None:
    acceptance = AcceptanceModel()
    acceptance.learn([0.5, 0.3], drafted_match=1, emitted=1)
    assert acceptance.hit_rate(2) == AcceptanceModel().hit_rate(2) and acceptance.hit_rate(
        1
    ) > AcceptanceModel().hit_rate(1)


@pytest.mark.parametrize("numbers", [(0.0, 200.0), (-1e30, 1.0), (1e30, 1.0), (0.0, 1e30), (0.0, -1e30)])
def test_a_steep_scaling_is_still_a_probability(numbers: tuple[float, float]) -> None:
    for score in (0.0, -0.1, -1.0, -7.0):
        assert 0.0 <= PlattScaling(*numbers)(score) <= 1.0
