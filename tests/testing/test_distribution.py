"""The statistic against hand arithmetic, against chance, and against distributions that are not the right ones."""

import pytest
import torch

from transformers_resps.testing.distribution import SIGNIFICANCE, Fit, Place, bins_of, goodness_of_fit, wrong_token


def test_on_one_distribution_it_is_pearsons_chi_square() -> None:
    probs = torch.tensor([0.5, 0.3, 0.2])
    counts = torch.tensor([60, 25, 15])
    bins = torch.repeat_interleave(torch.arange(3), counts)
    fit = goodness_of_fit(probs.expand(100, -1), bins)
    assert fit.degrees == 2 and fit.draws == 100
    assert fit.chi_square == pytest.approx(10**2 / 50 + 5**2 / 30 + 5**2 / 20, rel=1e-5)
    assert fit.total_variation == pytest.approx(0.1, rel=1e-5)


def test_the_p_value_is_that_of_the_tables() -> None:
    assert Fit(1, 18.467, 4, 0.0).p_value == pytest.approx(0.001, rel=1e-3)
    assert Fit(1, 3.841, 1, 0.0).p_value == pytest.approx(0.05, rel=1e-3)


def test_places_that_are_certain_add_nothing() -> None:
    certain = torch.tensor([1.0, 0.0, 0.0]).expand(500, -1)
    open_places = torch.tensor([0.2, 0.4, 0.4]).expand(50, -1)
    bins = torch.cat(
        [torch.zeros(500, dtype=torch.long), torch.repeat_interleave(torch.arange(3), torch.tensor([30, 10, 10]))]
    )
    diluted = goodness_of_fit(torch.cat([certain, open_places]), bins)
    assert diluted.chi_square == pytest.approx(goodness_of_fit(open_places, bins[500:]).chi_square, rel=1e-4)


def test_rare_bins_are_pooled_and_a_certain_text_tests_nothing() -> None:
    certain = torch.tensor([0.999, 0.0005, 0.0005]).expand(200, -1)
    assert goodness_of_fit(certain, torch.zeros(200, dtype=torch.long)).degrees == 0
    assert goodness_of_fit(certain, torch.zeros(200, dtype=torch.long)).p_value == 1


def places(count: int, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(19, generator=generator).mul(2).softmax(-1) for _ in range(count)]


def test_false_alarms_are_as_rare_as_promised() -> None:
    generator = torch.Generator().manual_seed(0)
    small = 0
    for _ in range(300):
        probs = torch.stack(places(60, generator)).sort(-1, descending=True).values
        bins = torch.multinomial(probs, 1, generator=generator)[:, 0].clamp(max=3)
        pooled = torch.cat([probs[:, :3], probs[:, 3:].sum(-1, keepdim=True)], dim=1)
        p_value = goodness_of_fit(pooled, bins).p_value
        assert p_value >= SIGNIFICANCE
        small += p_value < 0.05
    assert 3 <= small <= 30, "of 300, 15 are expected below 0.05"


def test_the_bins_are_the_drafts_and_three_pools_of_the_rest() -> None:
    probs = torch.tensor([0.05, 0.4, 0.2, 0.1, 0.08, 0.07, 0.06, 0.04])
    place = Place(0, probs, [6, 1], [0.5, 0.3])
    assert bins_of(place).tolist() == [6, 1, 4, 5, 5, 5, 0, 6]


def test_the_control_keeps_a_draft_with_p_over_q() -> None:
    generator = torch.Generator().manual_seed(0)
    place = Place(0, torch.tensor([0.2, 0.3, 0.5]), [0, 1], [0.4, 0.2])
    drawn = [wrong_token(place, generator) for _ in range(4000)]
    shares = [drawn.count(token) / len(drawn) for token in range(3)]
    assert shares == pytest.approx([0.5, 0.5, 0.0], abs=0.03), "0.2/0.4 for the first; the second is always kept"
