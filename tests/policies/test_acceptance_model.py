"""Probabilities of acceptance follow the outcomes, whatever the head claims."""

import math
import random

import pytest

from transformers_resps.policies.acceptance_model import AcceptanceModel, PlattScaling


def test_no_scalings_are_refused() -> None:
    with pytest.raises(ValueError, match="got no scalings, but needs one.*PlattScaling"):
        AcceptanceModel([])


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
    acceptance, shallower = AcceptanceModel(), AcceptanceModel()
    acceptance.learn([0.5, 0.3], drafted_match=1, emitted=1)
    shallower.learn([0.5], drafted_match=1, emitted=1)
    assert acceptance.reach(4) == shallower.reach(4) and acceptance.hit_rate(1) > AcceptanceModel().hit_rate(1)


def test_each_level_of_a_block_is_believed_by_its_own_outcomes() -> None:
    """Slots that claim 0.8 each: the first two keep their word, the next two are right half as often."""
    acceptance, generator = AcceptanceModel(), random.Random(0)
    truth = (0.8, 0.8, 0.4, 0.4)
    scores = [level * math.log(0.8) for level in range(1, 7)]
    for _ in range(400):
        level_probs = [acceptance.probabilities([score], level)[0] for level, score in enumerate(scores, start=1)]
        matched = next((level for level, hit in enumerate(truth) if generator.random() >= hit), len(truth))
        acceptance.learn(level_probs[:4], matched, emitted=matched + 1)
    found = [acceptance.probabilities([score], level)[0] for level, score in enumerate(scores, start=1)]
    assert found[:4] == pytest.approx([0.8, 0.64, 0.256, 0.102], rel=0.2)
    assert found[5] == pytest.approx(found[3] / 4 * 0.64, rel=0.4), "deeper levels are as the last that is known"
    discounts = acceptance.discounts(6)
    assert discounts == sorted(discounts, reverse=True) and discounts[3] == pytest.approx(2 * math.log(0.5), abs=0.3)
    assert AcceptanceModel().discounts(3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("numbers", [(0.0, 200.0), (-1e30, 1.0), (1e30, 1.0), (0.0, 1e30), (0.0, -1e30)])
def test_a_steep_scaling_is_still_a_probability(numbers: tuple[float, float]) -> None:
    for score in (0.0, -0.1, -1.0, -7.0):
        assert 0.0 <= PlattScaling(*numbers)(score) <= 1.0
