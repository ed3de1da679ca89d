"""Draws ahead are those of `torch.multinomial`, one position after the other."""

import pytest
import torch
from transformers import set_seed

from transformers_resps.decoding.acceptance import Draws, draws_alike


@pytest.mark.parametrize("vocabulary", [5, 64, 4099])
def test_a_path_through_the_levels_draws_what_multinomial_draws(vocabulary: int) -> None:
    compare_with_multinomial(vocabulary, torch.device("cpu"), torch.default_generator)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [5, 4099, 49152, 151936])
def test_a_gpu_draws_what_multinomial_draws(vocabulary: int) -> None:
    assert draws_alike(torch.device("cuda", 0), vocabulary)
    compare_with_multinomial(vocabulary, torch.device("cuda", 0), torch.cuda.default_generators[0])


def compare_with_multinomial(vocabulary: int, device: torch.device, generator: torch.Generator) -> None:
    """Several paths through the levels of one tree, for several seeds: tokens, and the generator afterwards."""
    scores = torch.randn(12, vocabulary, generator=torch.Generator().manual_seed(0)).to(device) * 2
    scores[:, 0] = -torch.inf
    levels = torch.tensor([0, 1, 1, 2, 1, 2, 3, 2, 3, 3, 2, 1], device=device)
    for seed in range(20):
        set_seed(seed)
        draws = Draws(4, scores)
        picks = draws.pick(scores, levels).tolist()
        drawn = generator.get_state()
        for path in ([0, 1, 3, 6], [0, 2, 5, 9], [0, 11, 10], [0]):
            generator.set_state(drawn)
            draws.give_back(len(path))
            state = generator.get_state()
            set_seed(seed)
            expected = [int(torch.multinomial(scores[node : node + 1].softmax(-1), 1)) for node in path]
            assert [picks[node] for node in path] == expected
            assert torch.equal(generator.get_state(), state)


def test_numbers_that_another_thread_has_drawn_since_are_not_drawn_again() -> None:
    draws = Draws(3, torch.zeros(1, 7))
    torch.rand(())
    state = torch.get_rng_state()
    draws.give_back(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_drawn_from_scores_that_allow_none() -> None:
    scores = torch.zeros(5, 7)
    scores[1, 3], scores[2], scores[4, 1] = torch.nan, -torch.inf, torch.inf
    picks = Draws(1, scores).pick(scores, torch.zeros(5, dtype=torch.long))
    assert [pick >= 0 for pick in picks.tolist()] == [True, False, False, True, False]


def test_a_device_is_seen_to_draw_alike_and_nothing_is_drawn() -> None:
    set_seed(0)
    before = torch.get_rng_state()
    assert draws_alike(torch.device("cpu"), 31)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_that_draws_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "multinomial", lambda probs, count: torch.zeros(1, count, dtype=torch.long))
    assert not draws_alike(torch.device("cpu"), 32)
    draws_alike.cache_clear()
