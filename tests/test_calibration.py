"""Cost tables: planted costs are found, kept, and believed only where they were measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import FakeClock
from tests.targets import Architecture
from transformers_resps import DraftHead
from transformers_resps.calibration import CONTEXTS, NODES, WIDTHS, CostTable, calibrate
from transformers_resps.cli import main


@pytest.fixture(scope="module")
def target() -> Any:
    return Architecture("llama", {"max_position_embeddings": 1024}).build("sdpa")


@pytest.fixture(scope="module")
def head(target: Any) -> DraftHead:
    return DraftHead.from_target(target)


def plant(target: Any, clock: FakeClock, seconds: Any) -> Any:
    """Every forward of the target takes `seconds(tokens)` on `clock`."""
    return target.register_forward_hook(
        lambda module, args, kwargs, output: clock.advance(seconds(kwargs["input_ids"].shape[1])), with_kwargs=True
    )


def test_planted_costs_are_found(target: Any, head: DraftHead, tmp_path: Path) -> None:
    clock = FakeClock()
    hook = plant(target, clock, lambda tokens: 1.0 if tokens == 1 else 3.0 + tokens)
    table = calibrate(target, head, folder=tmp_path, clock=clock)
    hook.remove()
    assert set(table.verify) == set(CONTEXTS) and set(table.draft) == set(WIDTHS)
    for row in table.verify.values():
        assert row == {nodes: 1.0 if nodes == 1 else 3.0 + nodes for nodes in NODES}
    assert table.verify_seconds(5, 400) == pytest.approx(8.0)
    assert table.verify_seconds(40, 400) == pytest.approx(43.0)
    assert 0 < table.overhead < 1
    costs = table.running(400)
    assert costs.step(1, 0) == pytest.approx(1.0 + table.overhead)
    assert costs.knows_plain and costs.verify(1) == 1.0 and costs.verify(8) == 11.0


def test_the_command_prints_the_table_and_what_it_means(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target.save_pretrained(tmp_path / "target")
    monkeypatch.setattr("transformers_resps.calibration.HF_HOME", str(tmp_path))
    assert main(["calibrate", str(tmp_path / "target")]) == 0
    printed = capsys.readouterr().out
    assert "  nodes" in printed and "beside its forwards" in printed and "a step must accept more than" in printed


def test_a_table_is_measured_once_and_kept(target: Any, head: DraftHead, tmp_path: Path) -> None:
    first = calibrate(target, head, folder=tmp_path)
    assert calibrate(target, head, folder=tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1
    assert calibrate(target, None, folder=tmp_path).draft == {}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_table_from_elsewhere_is_refused(target: Any, head: DraftHead, tmp_path: Path) -> None:
    table = calibrate(target, head, folder=tmp_path)
    elsewhere = CostTable(table.verify, table.draft, table.identity | {"threads": 99, "dtype": "torch.int8"})
    with pytest.raises(ValueError, match=r"dtype 'torch.int8' \(here: 'torch.float64'\), threads 99"):
        elsewhere.check_here(target, head)


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "not json", json.dumps({"verify": {"9": {"1": 0.0}}, "draft": {}, "identity": {}})],
)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"Delete it and run|and run `calibrate"):
        CostTable.load(path)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_costs_that_are_no_times_are_refused(seconds: float) -> None:
    for verify, draft in (({9: {1: seconds}}, {}), ({9: {1: 1.0}}, {1: seconds})):
        with pytest.raises(ValueError, match="every measured forward takes time. Measure with `calibrate"):
            CostTable(verify, draft, {})


def test_costs_that_are_not_monotone_stay_so() -> None:
    table = CostTable({100: {1: 0.039, 2: 0.063, 8: 0.066, 32: 0.108}}, {1: 0.002, 4: 0.004}, {})
    assert table.verify_seconds(2, 50) > 0.06 and table.verify_seconds(20, 50) == pytest.approx(0.087)
    assert table.draft_seconds(2, 3) == pytest.approx(3 * (0.002 + 0.002 / 3))
    assert torch.isfinite(torch.tensor(table.verify_seconds(200, 10**6)))
