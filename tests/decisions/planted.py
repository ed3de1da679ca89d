"""A policy whose clock is planted, so that what it decides can be compared between two versions of the code."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from transformers_resps.policies.base import Level, Observation, Policy, PolicyWrapper, count_nodes
from transformers_resps.telemetry.report import StepRecord
from transformers_resps.tree import TreeShape


NOISE = (1.0, 1.3, 0.9, 1.0, 2.5, 1.1, 1.0, 0.8, 1.0, 1.0, 1.7, 1.0, 0.95)  # of a machine that others use, too


class PlantedClock(PolicyWrapper):
    """Shows a policy planted seconds in place of those that a step took."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.steps = 0

    def choose(self, observation: Observation) -> TreeShape:
        return self.policy.choose(replace(observation, prompt_seconds=0.05))

    def grow(self, level: Level) -> bool:
        return self.policy.grow(level)

    def size(self, scores: Tensor, levels: Tensor) -> int:
        return count_nodes(self.policy, scores, levels)

    def observe(self, record: StepRecord) -> None:
        verify = (0.03 + 0.001 * record.verified) * NOISE[self.steps % len(NOISE)]
        draft = 0.0002 * record.drafted
        self.steps += 1
        seconds = {"draft_seconds": draft, "verify_seconds": verify, "step_seconds": draft + verify + 0.001}
        self.policy.observe(replace(record, **seconds))


def decision(record: StepRecord) -> list[Any]:
    """What was decided in a step and what came of it, without the seconds that it took."""
    shape = record.shape
    asked = [shape.total_tokens, shape.depth, shape.top_k, shape.lookup]
    return [
        *asked,
        record.drafted,
        record.verified,
        *map(list, (record.accepted, record.emitted, record.drafted_match)),
    ]
