"""Costs of GPUs that no run here measured: data sheets, and what a published rate says of how much can be reached."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers_resps.policies.costs import CostModel


_WEIGHTS, _PARAMETERS = 16.06e9, 8.03e9  # bytes in bfloat16, and numbers, of Llama-3.1-8B
_LEVEL, _START = 0.75e9, 0.10e9  # bytes of a level of its EAGLE-3 head, and of reading the target's features
_BLOCK = 3.2e9  # bytes of a pass of a block head: five layers of the target's width and its output rows
# Of the bandwidth: plain decoding writes 158.34 tokens a second on an H100 (arXiv 2503.01840, SGLang, batch 1).
_REACHED = _WEIGHTS * 158.34 / 3.35e12


@dataclass(frozen=True)
class PlantedGpu(CostModel):
    """An 8B target and its head on one GPU, launches captured.

    Attributes:
        bandwidth: bytes a second, of the data sheet.
        operations: a second in bfloat16, dense, of the data sheet.
    """

    name: str
    bandwidth: float
    operations: float
    overhead: float = 0.0

    def verify_seconds(self, nodes: int, context: int) -> float:
        reading, multiplying = _WEIGHTS / self.bandwidth, 2 * _PARAMETERS * nodes / self.operations
        return max(reading, multiplying) / _REACHED

    def draft_seconds(self, width: int, levels: int) -> float:
        return (_START + levels * _LEVEL) / self.bandwidth / _REACHED if levels else 0.0

    @property
    def block_seconds(self) -> float:
        """Seconds of one pass of a block head."""
        return _BLOCK / self.bandwidth / _REACHED

    def block_speed(self, tokens: int, steps: Mapping[str, int]) -> float:
        """Return the speed over plain decoding of counted steps, by "nodes/accepted"; prompts cost nothing."""
        counts = [(int(step.partition("/")[0]), count) for step, count in steps.items()]
        taken = sum(count * (self.verify_seconds(nodes, 0) + self.block_seconds) for nodes, count in counts)
        return tokens * self.verify_seconds(1, 0) / taken


GPUS = (PlantedGpu("H100", 3.35e12, 989e12), PlantedGpu("A100", 2.039e12, 312e12))
