"""A fake machine with planted costs, a planted head and a planted lookup."""

import math
import random
from collections.abc import Callable

import torch

from transformers_resps.policies.base import Level, Observation, Policy, count_nodes
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import Pricing, TreeShape


class Machine:
    """A fake machine, head and lookup: each level is right with `hit`, each lookup token with `lookup_hit`.

    Args:
        verify: nodes -> seconds of the target's forward, or seconds of each further node where a plain step takes 1.
        level_seconds: of the head.
        hit: what is true; the head claims `claimed`, by default the truth.
        device: of the target.
        start_seconds: of a draft beside its levels.
        least_nodes: that each forward computes.
        prompt_seconds: of the head's reading of each prompt, of 100 tokens.
    """

    def __init__(
        self,
        verify: Callable[[int], float] | float,
        level_seconds: float,
        hit: float,
        lookup_hit: float = 0.0,
        claimed: float | None = None,
        seed: int = 0,
        device: str = "cpu",
        start_seconds: float = 0.0,
        least_nodes: int = 1,
        prompt_seconds: float = 0.0,
    ) -> None:
        self.device, self.prompt_seconds = device, prompt_seconds
        self.reads = True  # whether the head has read the prompt of this text
        self.read: list[bool] = []  # of each text
        self.verify = verify if callable(verify) else lambda nodes: 1.0 + verify * (nodes - 1)
        self.level_seconds, self.hit, self.lookup_hit = level_seconds, hit, lookup_hit
        self.start_seconds, self.least_nodes = start_seconds, least_nodes
        self.claimed = hit if claimed is None else claimed
        self.generator = random.Random(seed)
        self.context = 100
        self.tokens, self.seconds = 0, 0.0
        self.shapes: list[TreeShape] = []
        self.verified: list[int] = []
        self.records: list[StepRecord] = []

    def run(self, policy: Policy, steps: int) -> float:
        """One text of so many steps; tokens per second."""
        for step in range(steps):
            policy.observe(self._step(policy, step, 50))
        return self.tokens / self.seconds

    def write(self, policy: Policy, tokens: int) -> float:
        """One text of so many tokens; its speed in those of plain decoding."""
        written, before, step = 0, self.seconds, 0
        self.reads = policy.wants_head(1, 100, tokens)
        self.read.append(self.reads)
        self.seconds += self.prompt_seconds * self.reads
        while written < tokens:
            record = self._step(policy, step, tokens - written)
            policy.observe(record)
            written, step = written + record.emitted_total, step + 1
        return tokens * self.verify(1) / (self.seconds - before)

    def _step(self, policy: Policy, step: int, room: int) -> StepRecord:
        prefix_accept_probs = [self.lookup_hit ** (i + 1) for i in range(8)] if self.lookup_hit else []
        shape = policy.choose(
            Observation(
                torch.zeros(1, 4),
                self.context + step,
                step,
                room,
                lambda: prefix_accept_probs,
                self.prompt_seconds * self.reads,
                can_draft=self.reads,
                device_type=torch.device(self.device).type,
            )
        ).within(room - 1)
        nodes, levels = 1, 0
        if shape.asks_head:
            levels, claim = 1, math.log(self.claimed)
            while levels < shape.depth and (
                not policy.grows or policy.grow(Level(levels, torch.full((1, 1), claim * levels)))
            ):
                levels += 1
            scores = torch.tensor([[claim * (i + 1) for i in range(levels)]])
            nodes = max(
                min(*count_nodes(policy, scores, torch.arange(1, levels + 1)), shape.total_tokens, levels + 1), 1
            )
        drafted_match = self._run_length(self.hit, levels)
        accepted = max(min(drafted_match, nodes - 1), self._run_length(self.lookup_hit, shape.lookup))
        verify = self.verify(max(nodes + shape.lookup, self.least_nodes))
        draft = self.start_seconds + self.level_seconds * levels if levels else 0.0
        self.tokens += accepted + 1
        self.seconds += verify + draft
        self.shapes.append(shape)
        self.verified.append(nodes + shape.lookup)
        record = StepRecord(
            shape,
            levels + shape.lookup,
            nodes + shape.lookup,
            RowCounts([accepted]),
            RowCounts([accepted + 1]),
            draft,
            verify,
            verify + draft,
            RowCounts([min(drafted_match, accepted + 1)]),
            pricing=Pricing(least_nodes=self.least_nodes),
        )
        self.records.append(record)
        return record

    def _run_length(self, hit: float, most: int) -> int:
        length = 0
        while length < most and self.generator.random() < hit:
            length += 1
        return length


def _between(row: dict[int, float]) -> Callable[[int], float]:
    known = sorted(row)

    def seconds(nodes: int) -> float:
        place = min(max(sum(count < nodes for count in known), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        return row[low] + (nodes - low) / (high - low) * (row[high] - row[low])

    return seconds


# Measured: SmolLM2 in fp32 on two Zen 3 cores, and in bf16 with AVX-512 (DESIGN.md, section 6).
JUMPING = _between({1: 0.057, 2: 0.098, 4: 0.094, 8: 0.099, 12: 0.120, 16: 0.127, 32: 0.178, 60: 0.248})


SLOPING = _between({1: 0.024, 8: 0.029, 16: 0.034, 32: 0.043, 64: 0.068})


# The same in bf16, compiled: four rows are computed at least.
COMPILED = _between({1: 0.0135, 4: 0.0135, 6: 0.0145, 8: 0.0174, 12: 0.0203, 16: 0.0244, 32: 0.0427})


FLAT = _between({1: 0.020, 64: 0.021})


MACHINES = {"flat": (FLAT, 0.001), "sloping": (SLOPING, 0.003), "jumping": (JUMPING, 0.005), "slow": (JUMPING, 0.008)}
