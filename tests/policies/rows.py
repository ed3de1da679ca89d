"""What policies see of a batch, and what they are told of its steps."""

from typing import Any

import torch

from transformers_resps.policies.base import Observation
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import TreeShape


def observation(rows: int, step: int = 1) -> Observation:
    return Observation(torch.zeros(rows, 4), 100 + step, step, 96, list, row_count=rows)


def record(nodes: int, emitted: tuple[int, ...], seconds: float, **more: Any) -> StepRecord:
    shape = TreeShape.plain() if nodes == 1 else TreeShape(nodes, nodes - 1, 1)
    accepted = RowCounts(max(count - 1, 0) for count in emitted)
    return StepRecord(shape, nodes - 1, nodes, accepted, RowCounts(emitted), 0.0, seconds, seconds, **more)
