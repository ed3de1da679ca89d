"""A policy beside the best fixed tree and the oracle on held-out texts, and what that proves."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..telemetry.rates import Timing, bootstrap_interval, rate


FEW_TEXTS = 10


@dataclass(frozen=True)
class PolicyComparison:
    """The same held-out texts, decoded with a policy and with one fixed tree.

    Attributes:
        own: tokens and seconds of each text with the policy.
        fixed: of the same texts, in the same order, with the best fixed tree of the training texts.
        oracle_seconds: the least that all texts together could have taken.
        distinct_actions: how many different trees the policy chose.
        learned_prompts: how many of the held-out prompts it was trained on.
    """

    own: Sequence[Timing]
    fixed: Sequence[Timing]
    oracle_seconds: float
    distinct_actions: int
    learned_prompts: int = 0

    @property
    def gain(self) -> float:
        """Tokens per second over those of the best fixed tree."""
        return rate(self.own) / rate(self.fixed)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The middle 95% of `gain` over texts drawn with replacement."""
        return bootstrap_interval([[one] for one in self.own], [[one] for one in self.fixed])

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        low, high = self.interval
        return {
            "tokens_per_second": rate(self.own),
            "best_fixed_tokens_per_second": rate(self.fixed),
            "gain_over_best_fixed": self.gain,
            "gain_over_best_fixed_low": low,
            "gain_over_best_fixed_high": high,
            "oracle_regret": sum(one.seconds for one in self.own) / self.oracle_seconds - 1,
            "distinct_actions": self.distinct_actions,
            "held_out_texts": len(self.own),
        }

    @property
    def doubts(self) -> list[str]:
        """Reasons why the policy is not worth more than the best fixed tree; empty if it is."""
        low, high = self.interval
        found = []
        if low <= 1.0:
            found.append(
                f"it is not faster than the best fixed tree beyond chance ({self.gain:.3f} times its speed, 95% "
                f"interval {low:.3f} to {high:.3f})"
            )
        if self.distinct_actions == 1:
            found.append("it chose one tree everywhere, which a `FixedPolicy` does as well")
        if self.learned_prompts:
            found.append(f"{self.learned_prompts} of the held-out prompts are among those that it was trained on")
        if len(self.own) < FEW_TEXTS:
            count = len(self.own)
            found.append(f"it was judged on {count} held-out text{'s' * (count != 1)}, which prove little")
        return found

    @property
    def verdict(self) -> str:
        """One sentence for the card."""
        if self.doubts:
            return f"Not shown to pay: {'; '.join(self.doubts)}."
        low, high = self.interval
        return (
            f"Faster than the best fixed tree: {self.gain:.3f} times its speed, 95% interval {low:.3f} to {high:.3f} "
            f"over {len(self.own)} held-out texts."
        )

    def report(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return {**self.metrics(), "verdict": self.verdict}
