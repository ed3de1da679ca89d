"""A training ends by its processor seconds, and goes on with what was left of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.studies import block_heads


def test_a_budget_sets_the_rate_by_its_clock_and_outlives_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [50.0]
    monkeypatch.setattr(block_heads.time, "process_time", lambda: now[0])
    args, optimizer = SimpleNamespace(learning_rate=1.0), SimpleNamespace(param_groups=[{"lr": 0.0}])
    control: Any = SimpleNamespace(should_training_stop=False)

    def rate(budget: block_heads.Budget, seconds: float) -> float:
        now[0] += seconds
        budget.on_step_begin(args, None, control, optimizer=optimizer)
        budget.on_step_end(args, None, control)
        return float(optimizer.param_groups[0]["lr"])

    budget = block_heads.Budget(100.0, tmp_path)
    budget.on_train_begin(args, SimpleNamespace(global_step=0), control)
    assert [rate(budget, part) for part in (0.0, 1.0, 9.0, 70.0)] == pytest.approx([0.02, 0.5, 1.0, 0.6])
    budget.on_save(args, None, control)
    now[0] = 3.0  # another process
    again = block_heads.Budget(100.0, tmp_path)
    again.on_train_begin(args, SimpleNamespace(global_step=7), control)
    assert rate(again, 10.0) == pytest.approx(0.3) and not control.should_training_stop
    assert rate(again, 11.0) == 0.02 and control.should_training_stop
