"""The study of the guard times useless sources of every kind."""

from typing import Any

import torch

from training.studies.experiment import Experiment
from training.studies.guard_speed import KINDS, measure, sources_of, table
from training.studies.random_target import random_target
from transformers_resps import DraftHead, attach


def test_every_kind_of_source_is_timed_and_what_is_untrained_is_never_right() -> None:
    target: Any = attach(random_target("tiny"))
    given = Experiment(target, DraftHead.from_target(target), [torch.arange(5, 12)])
    sources = sources_of(given, KINDS)
    assert len(sources["untrained small model"].model.layers) == len(target.model.layers) // 4
    rows = table(measure(given, sources, max_new_tokens=6, repeats=1))
    names = ["untrained", "given", "untrained MTP layer", "untrained small model"]
    assert list(dict.fromkeys(row["head"] for row in rows)) == names
    assert [row["policy"] for row in rows] == ["ours", "ours", "60/5/10", "60/5/10"] * 4 + ["never drafts"]
    assert all(row["tau"] < 1.3 for row in rows)
