"""The maths of policy optimisation against hand arithmetic."""

import math
from typing import Any

import pytest
import torch

from transformers_resps.trainers.ppo import (
    clipped_surrogate,
    entropy,
    expected_gain,
    gae,
    standardized,
    tokens_per_second,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_advantages_of_one_text_by_hand() -> None:
    advantages = gae(tensor(1, 2, 3), tensor(0.5, 1, 2), torch.tensor([False, False, True]), discount=0.9, decay=0.8)
    last = 3 - 2
    middle = 2 + 0.9 * 2 - 1 + 0.72 * last
    first = 1 + 0.9 * 1 - 0.5 + 0.72 * middle
    torch.testing.assert_close(advantages, tensor(first, middle, last))


def test_nothing_leaks_from_one_text_into_the_one_before() -> None:
    ends = torch.tensor([False, True, False, True])
    rewards, values = tensor(1, 2, 3, 4), tensor(4, 3, 2, 1)
    together = gae(rewards, values, ends, discount=0.95, decay=0.9)
    apart = [
        gae(rewards[part], values[part], ends[part], discount=0.95, decay=0.9) for part in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(together, torch.cat(apart))


@pytest.mark.parametrize(("discount", "every_one_ends"), [(0.0, False), (0.95, True)])
def test_a_decision_that_stands_alone_has_the_one_step_advantage(discount: float, every_one_ends: bool) -> None:
    rewards, values = tensor(5, 1, 2), tensor(1, 1, 4)
    ends = torch.full((3,), every_one_ends)
    torch.testing.assert_close(gae(rewards, values, ends, discount=discount, decay=0.9), rewards - values)


def test_the_surrogate_clips_what_would_go_too_far_and_only_that() -> None:
    old = tensor(0.5, 0.5, 0.5, 0.5).log()
    new = tensor(0.75, 0.25, 0.75, 0.25).log()  # ratios 1.5, 0.5, 1.5, 0.5
    advantages = tensor(2, 2, -2, -2)
    by_hand = (1.2 * 2 + 0.5 * 2 - 1.5 * 2 - 0.8 * 2) / 4
    assert clipped_surrogate(new, old, advantages, 0.2).item() == pytest.approx(by_hand)


def test_a_clipped_ratio_gets_no_gradient() -> None:
    log_probs = tensor(0.75, 0.55).log().requires_grad_()
    clipped_surrogate(log_probs, tensor(0.5, 0.5).log(), tensor(1, 1), 0.2).backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, tensor(0, 0.5 * 1.1))


def test_entropy_of_known_distributions() -> None:
    logits = torch.stack([tensor(0, 0, 0, 0), tensor(0.5, 0.25, 0.125, 0.125).log(), tensor(0, -1e4, -1e4, -1e4)])
    torch.testing.assert_close(entropy(logits), tensor(math.log(4), 1.75 * math.log(2), 0))


def test_standardized_values_and_the_case_of_no_spread() -> None:
    values = standardized(tensor(1, 2, 3, 6))
    assert values.mean().item() == pytest.approx(0, abs=1e-9)
    assert values.std(correction=0).item() == pytest.approx(1)
    assert standardized(tensor(7, 7)).tolist() == [0, 0]
    assert standardized(tensor(7)).tolist() == [0]


def test_gain_prefers_throughput_where_the_mean_of_rates_does_not() -> None:
    """6 tokens in 30 ms or 7 in 36 ms, at 0.15 tokens per ms: the second is worth more."""
    emitted, seconds = tensor(6, 7), tensor(0.030, 0.036)
    outcomes: dict[str, Any] = {"emitted": emitted, "seconds": seconds, "rate": 150.0}
    assert tokens_per_second(**outcomes, persistence=1).tolist() == pytest.approx([1.5, 1.6])
    assert (emitted / seconds).argmax() == 0
    assert tokens_per_second(**outcomes, persistence=10).tolist() == pytest.approx([0.15, 0.16])


def test_standardized_gains_are_blind_to_states_and_units() -> None:
    values = torch.stack([tensor(1, 2, 6), tensor(-3, 0, 3)])
    relative = standardized(values)
    by_hand = torch.stack([tensor(-2, -1, 3), tensor(-3, 0, 3)]) / math.sqrt((4 + 1 + 9 + 9 + 9) / 6)
    torch.testing.assert_close(relative, by_hand)
    torch.testing.assert_close(standardized(7 * values + tensor(5, -7)[:, None]), relative)
    assert standardized(torch.ones(2, 3)).abs().max() == 0


def test_expected_gain_has_the_exact_policy_gradient() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_gain(logits, values).backward()
    probs = logits.detach().softmax(-1)
    by_hand = probs * (values - (probs * values).sum(-1, keepdim=True)) / 5  # d E[v] / d logit
    torch.testing.assert_close(logits.grad, by_hand)
