"""What held-out texts prove about a policy, by hand."""

import pytest

from transformers_resps.telemetry.report import Timing
from transformers_resps.trainers.policy_trainer import PolicyComparison


def compared(seconds: list[float], texts: int = 12, actions: int = 3) -> PolicyComparison:
    """`texts` texts of ten tokens, over which `seconds` repeat; the best fixed tree takes one second for each."""
    own = [Timing(10, seconds[number % len(seconds)]) for number in range(texts)]
    return PolicyComparison(own, [Timing(10, 1.0)] * texts, 0.5 * texts, actions)


def test_the_numbers_are_totals_over_totals() -> None:
    metrics = compared([0.5, 1.0], texts=2).metrics()
    assert metrics["tokens_per_second"] == pytest.approx(20 / 1.5) and metrics["best_fixed_tokens_per_second"] == 10.0
    assert metrics["gain_over_best_fixed"] == pytest.approx(2 / 1.5) and metrics["held_out_texts"] == 2
    assert (metrics["gain_over_best_fixed_low"], metrics["gain_over_best_fixed_high"]) == (1.0, 2.0)
    assert metrics["oracle_regret"] == pytest.approx(0.5) and metrics["distinct_actions"] == 3


def test_a_policy_that_is_slower_is_not_to_be_used() -> None:
    slower = compared([1.25, 1.37])
    assert slower.verdict.startswith(
        "24% slower, do not use it: it is slower than the best fixed tree beyond chance (0.7"
    )
    assert not compared([0.5, 1.4]).is_slower


@pytest.mark.parametrize(
    ("comparison", "doubts"),
    [
        (compared([0.8]), []),
        (compared([0.5, 1.4]), ["not faster than the best fixed tree beyond chance (1.053 times"]),
        (compared([0.8], actions=1), ["chose one tree everywhere"]),
        (compared([0.8], texts=2), ["judged on 2 held-out texts, which prove little"]),
        (compared([1.0], texts=1, actions=1), ["beyond chance", "one tree everywhere", "1 held-out text, which"]),
    ],
)
def test_a_policy_that_is_not_shown_to_pay_is_doubted(comparison: PolicyComparison, doubts: list[str]) -> None:
    assert len(comparison.doubts) == len(doubts)
    assert all(doubt in found for doubt, found in zip(doubts, comparison.doubts, strict=True))
    assert comparison.verdict.startswith("Not shown to pay: " if doubts else "Faster than the best fixed tree: 1.250")
