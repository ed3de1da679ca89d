"""Rollouts that several ways write in turn."""

from pathlib import Path
from typing import Any

import torch

from tests.conftest import build_target
from tests.tokenizers import letter_tokenizer
from training.studies.memory_rollouts import PLAIN, Rollouts, table, ways_of
from transformers_resps import attach


def test_the_trainer_gets_the_plain_group_whatever_else_is_tried(tmp_path: Path) -> None:
    target: Any = attach(build_target(initializer_range=0.4))
    ids = torch.tensor([[5, 6, 7, 5, 6]] * 4)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": True}
    rollouts = Rollouts(target, ways_of(tmp_path, letter_tokenizer(), 1000))
    for seed in (0, 1):
        torch.manual_seed(seed)
        plain = target.generate(ids, **given, policy="plain")
        left_at = torch.get_rng_state()
        torch.manual_seed(seed)
        assert rollouts.generate(ids, **given).tolist() == plain.tolist()
        assert torch.equal(torch.get_rng_state(), left_at)
    for step in rollouts.steps:
        assert all(way["same"] for name, way in step.items() if "apart" not in name)
    assert all(len(way.memory) > 8 for way in rollouts.ways if way.memory is not None)
    rows = table(rollouts.steps, 1)
    assert {row["when"] for row in rows} == {"questions seen first", "seen again"}
    assert all(row["to plain"] == 1.0 for row in rows if row["way"] == PLAIN)
