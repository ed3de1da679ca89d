"""The clock of training/studies/noisy_clocks.py: a policy sees noise, and its score doesn't."""

import math

import pytest

from training.studies import noisy_clocks
from transformers_resps.policies.costs import CostTable


TABLE = CostTable({64: {1: 1.0, 4: 1.3, 16: 2.0}}, {1: 0.04, 4: 0.07}, {}, 0.01)


def test_a_policy_sees_slow_stretches_and_interruptions_and_is_scored_without(monkeypatch: pytest.MonkeyPatch) -> None:
    script = noisy_clocks
    noise = script.Noise(jitter=0.05, slowness=0.15, memory=0.98, interrupted=0.02)
    clock = script.NoisyClock(TABLE, noise, seed=0)
    seen = [clock.verify_seconds(4, 64) / TABLE.verify_seconds(4, 64) for _ in range(4000)]
    assert clock.seconds == pytest.approx(4000 * (1.3 + 0.01))
    assert sum(factor > 2.5 for factor in seen) == pytest.approx(80, abs=30)
    logs = [math.log(factor) for factor in seen if factor < 2.5]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((log - mean) ** 2 for log in logs) / len(logs))
    steps = math.sqrt(sum((b - a) ** 2 for a, b in zip(logs, logs[1:], strict=False)) / len(logs))
    assert spread == pytest.approx(math.hypot(0.05, 0.15), rel=0.25), "in all"
    assert steps < 0.6 * spread, "what is slow stays so for a while"
    before = clock.seconds
    assert clock.draft_seconds(4, 2) > 0.0 and clock.seconds - before == pytest.approx(TABLE.draft_seconds(4, 2))
