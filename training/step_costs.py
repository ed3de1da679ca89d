"""Where the seconds of offline studies come from: cost tables that were measured when the machine was quiet."""

import json
from pathlib import Path
from typing import Any

import torch
from positions import chains_of
from torch import Tensor

from transformers_resps.calibration import CostTable
from transformers_resps.policy import ActionGrid
from transformers_resps.trainers import OutcomeTable, RecordedText, StepCosts, TextOutcomes, replay
from transformers_resps.trainers.replay import path_ranks


_BUCKET = 16  # positions of context that share a cost


def read_tables(files: list[Path]) -> dict[str, CostTable]:
    """By name: of a `results.json` the costs that its benchmark was run with, of other files all tables they hold."""
    tables: dict[str, CostTable] = {}
    for file in files:
        read = json.loads(file.read_text(encoding="utf-8"))
        found = {file.parent.name: read["costs"]} if "costs" in read else read
        tables |= {name: _table(values) for name, values in found.items()}
    return tables


def _table(values: dict[str, Any]) -> CostTable:
    verify = {int(c): {int(n): float(s) for n, s in row.items()} for c, row in values["verify"].items()}
    draft = {int(width): float(seconds) for width, seconds in values["draft"].items()}
    return CostTable(verify, draft, {}, float(values["overhead"] or 0.0))


def step_costs(table: CostTable) -> StepCosts:
    """For `replay_policy`."""
    return StepCosts(table.verify_seconds, table.draft_seconds, table.overhead)


def outcomes(text: RecordedText, grid: ActionGrid, table: CostTable) -> TextOutcomes:
    """Every action at every position. A looked-up node that the head drafted too is paid for once, as in decoding."""
    replayed, chains = replay(text), chains_of(text)[0]
    has_match = (chains[:, 0] >= 0).long()
    ranks = torch.stack([path_ranks(pool, chains[:, : text.depth]) for pool in text.pools.values()], dim=1)
    contexts = (text.prompt_length + 1 + torch.arange(len(text))) // _BUCKET
    buckets, bucket_of = contexts.unique(return_inverse=True)
    most = max(shape.total_tokens + shape.lookup for shape in grid.shapes)
    rows = [[table.verify_seconds(n, int(b) * _BUCKET) for n in range(1, most + 1)] for b in buckets]
    verify = torch.tensor(rows, dtype=torch.float64)[bucket_of]  # [t, most]
    seconds: list[Tensor] = []
    for shape in grid.shapes:
        added = has_match * shape.lookup
        draft = 0.0
        if shape.asks_head:
            shared = ranks[:, replayed.top_ks.index(shape.top_k), shape.depth - 1, : shape.depth]
            added = added - (shared < shape.total_tokens - 1).int().cumprod(-1).sum(-1).clamp(max=shape.lookup)
            draft = table.draft_seconds(shape.top_k, shape.depth)
        nodes = (shape.total_tokens + added.clamp(min=0))[:, None]
        seconds.append(verify.gather(1, nodes - 1) + draft + table.overhead)
    emitted = torch.stack([replayed.emitted(shape) for shape in grid.shapes], dim=1)
    return TextOutcomes(text.features, emitted, torch.cat(seconds, dim=1))


def outcome_table(texts: list[RecordedText], grid: ActionGrid, table: CostTable) -> OutcomeTable:
    return OutcomeTable([outcomes(text, grid, table) for text in texts])
