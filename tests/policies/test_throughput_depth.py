"""Off the CPU `auto` chooses the depth before it drafts, so that nothing is read between two levels."""

import pytest
import torch

from tests.policies.machine import FLAT, SLOPING, Machine
from transformers_resps import FixedPolicy, ReSpSPolicy, TreeShape
from transformers_resps.policies.auto import default_policy
from transformers_resps.policies.base import Level, Observation, Policy
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.telemetry import StepRecord


AWAY = "meta"  # any device but the CPU
TOKENS = 192


class Moody(Machine):
    """Its head is good or bad from one step to the next, and says so: what growing level by level is best at."""

    moods: tuple[float, ...]

    def _step(self, policy: Policy, step: int, room: int) -> StepRecord:
        self.hit = self.claimed = self.generator.choice(self.moods)
        return super()._step(policy, step, room)


def speed(verify: float, level: float, moods: tuple[float, ...], device: str) -> float:
    total = 0.0
    for seed in range(4):
        machine = Moody(verify, level, 0.5, seed=seed, device=device)
        machine.moods = moods
        policy = default_policy()
        machine.write(policy, 2 * TOKENS)  # finds out
        total += sum(machine.write(policy, TOKENS) for _ in range(4))
    return total


@pytest.mark.parametrize("level", [0.01, 0.03])  # of a plain step, as on accelerators
@pytest.mark.parametrize("verify", [0.001, 0.02])
@pytest.mark.parametrize(
    ("moods", "share"), [((0.6,), 0.97), ((0.85,), 0.97), ((0.1, 0.3), 0.97), ((0.35, 0.9), 0.92)]
)
def test_choosing_the_depth_beforehand_loses_little_against_growing(
    verify: float, level: float, moods: tuple[float, ...], share: float
) -> None:
    assert speed(verify, level, moods, AWAY) >= share * speed(verify, level, moods, "cpu")


@pytest.mark.parametrize("hit", [0.0, 0.05])
@pytest.mark.parametrize("tokens", [48, 512])
def test_a_head_that_is_never_right_costs_next_to_nothing(hit: float, tokens: int) -> None:
    for verify, level in ((0.02, 0.02), (0.2, 0.1)):
        machine = Machine(verify, level, hit, claimed=0.9, device=AWAY)
        assert machine.write(default_policy(), tokens) >= 0.97


class Asked(ThroughputPolicy):
    """Must not be asked between levels."""

    def grow(self, level: Level) -> bool:
        raise AssertionError(f"asked after level {level.depth}")


def test_off_the_cpu_no_policy_is_asked_between_levels() -> None:
    for verify in (FLAT, SLOPING):
        machine = Machine(verify, 0.001, 0.8, device=AWAY)
        assert machine.write(BaselineGuard(Asked()), 128) > 1.5
        assert max(shape.depth for shape in machine.shapes) == 8


def test_policies_that_decide_beforehand_say_so() -> None:
    fixed = FixedPolicy(TreeShape(8, 3, 2))
    assert not fixed.grows and not BaselineGuard(fixed).grows and not ReSpSPolicy.grows
    assert BaselineGuard(ThroughputPolicy()).grows
    policy = ThroughputPolicy()
    for device, grows in ((AWAY, False), ("cpu", True)):
        policy.costs.add(1, 1, 1.0, 0.1, 1.1)
        policy.choose(Observation(torch.zeros(1, 4), 10, 3, 50, list, device_type=device))
        assert policy.grows is grows
