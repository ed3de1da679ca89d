"""training/studies/planted_batches.py: prices by hand, and a clock that nothing else moves."""

from typing import Any

import pytest
import torch

from tests.conftest import build_target
from training.studies import planted_batches
from training.studies.experiment import Experiment
from transformers_resps import DraftHead, attach


def test_steps_cost_what_the_formula_says_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    script = planted_batches
    assert script.verify_seconds(8, 1) == pytest.approx((14.0 + 17.9 + 8 * 1.0) / 1e3)
    assert script.verify_seconds(8, 2) == pytest.approx((14.0 + 21.4 + 8 * 1.25 + 8 * 0.35) / 1e3)
    assert script.verify_seconds(8, 16) == pytest.approx((14.0 + 51.7 + 64 * 0.5 + 8 * 4.75 + 8 * 0.35) / 1e3)
    assert script.draft_seconds(4, 3) == pytest.approx((2.8 + 2 * 2.9) / 1e3)
    target: Any = attach(build_target(eos_token_id=None))
    torch.manual_seed(1)
    given = Experiment(
        target, DraftHead.from_target(target, 48).eval(), [torch.arange(3, 3 + n) for n in (5, 7, 4, 6)]
    )
    for place, name, made in script.planted(script.PlantedClock()):
        monkeypatch.setattr(place, name, made)
    runs = script.measure(given, 2, 6)
    plain = [run for run in runs if run.policy == "plain"]
    assert [run.seconds for run in plain] == pytest.approx([5 * script.verify_seconds(2, 1)] * 2)
    chains = [run for run in runs if run.policy == "2/1/1"]
    step = script.verify_seconds(2, 2) + script.draft_seconds(2, 1)
    assert all(run.seconds <= (run.steps - 1) * step + 1e-9 for run in chains)
    rows = {row["policy"]: row["to_plain_batch"] for row in script.table(runs)}
    assert rows["plain"] == 1.0 and set(rows) == set(script.POLICIES)
