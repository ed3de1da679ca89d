"""The study of policies over block heads, on recorded texts of a tiny target: bounds that hold for any recording."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import build_target
from tests.drafting.test_block_drafter import block_head
from training.prompts import recordings
from training.studies import ablations, block_policies
from training.studies.block_policies import COSTS, Saturation, budgets, grid_of, study
from transformers_resps import TreeShape, attach
from transformers_resps.replay import replay_policy


def test_the_best_fixed_tree_and_the_oracle_bound_what_any_way_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "FULL", ablations.FULL | {"max_steps": 8})
    monkeypatch.setattr(recordings, "BLOCKS", {1: 1, 10: 1})
    target: Any = attach(build_target(initializer_range=0.3))
    prompts = [torch.arange(3, 9) + first for first in range(3)]
    recordings.record(target, block_head(target), prompts, 0.0, tmp_path, 24)
    texts = block_policies.load_folder(tmp_path)
    grid, table = grid_of(texts[0]), COSTS["GPU"]
    assert max(shape.total_tokens for shape in grid.shapes if shape.top_k == 1) == 5 and len(grid) > 20
    rows = {row["way"]: row["speed"] for row in study(texts, texts, table)}
    assert rows["plain"] == 1.0 and rows["its chain"] <= rows["best fixed"] <= rows["oracle"]
    assert all(rows["saturation, chain"] > 0 for _ in rows) and rows["BlockPilot"] <= rows["oracle"]
    monkeypatch.setattr(block_policies, "BUDGETS", (4, 8))
    chain, longer = budgets(texts, table)
    assert chain["chain"] == longer["chain"] <= rows["oracle"] and longer["tree"] <= rows["oracle"]
    with pytest.raises(ValueError, match="Record it again"):
        replay_policy(texts[0], Saturation(TreeShape(9, 3, 2), 0.2), table)
