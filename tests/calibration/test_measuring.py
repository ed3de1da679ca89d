"""Cost tables: planted costs are found, kept, and believed only where they were measured."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from tests.conftest import FakeClock
from tests.targets import Architecture
from transformers_resps import DraftHead, TreeShape
from transformers_resps.calibration import CONTEXTS, NODES, WIDTHS, CostTable, Range, calibrate
from transformers_resps.drafting.head_drafter import TreeCandidateGenerator
from transformers_resps.tools.cli import main, what_must_be_accepted


@pytest.fixture(scope="module")
def target() -> Any:
    return Architecture("llama", {"max_position_embeddings": 1024}).build("sdpa")


@pytest.fixture(scope="module")
def head(target: Any) -> DraftHead:
    return DraftHead.from_target(target)


def plant(target: Any, clock: FakeClock, seconds: Any) -> Any:
    """Every forward of the target takes `seconds(tokens)` on `clock`, and half a second more with stock attention."""

    def advance(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        stock = 0.5 if target.config._attn_implementation == "sdpa" else 0.0
        clock.advance(seconds(kwargs["input_ids"].shape[1]) + stock)

    return target.register_forward_hook(advance, with_kwargs=True)


def test_planted_costs_are_found(
    target: Any, head: DraftHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    hook = plant(target, clock, lambda tokens: 1.0 if tokens == 1 else 3.0 + tokens)
    draft = TreeCandidateGenerator.draft

    def slow(self: Any, shape: TreeShape, policy: Any) -> Any:
        clock.advance(0.1 + 0.25 * shape.depth)
        return draft(self, shape, policy)

    monkeypatch.setattr(TreeCandidateGenerator, "draft", slow)
    table = calibrate(target, head, folder=tmp_path, clock=clock)
    hook.remove()
    assert table.draft == pytest.approx(dict.fromkeys(WIDTHS, 0.25))
    assert table.draft_range == {width: pytest.approx((0.25, 0.25)) for width in WIDTHS}
    assert set(table.verify) == set(CONTEXTS) and set(table.draft) == set(WIDTHS)
    for row in table.verify.values():
        assert row == {nodes: 1.0 if nodes == 1 else 3.0 + nodes for nodes in NODES}
    assert table.verify_seconds(5, 400) == pytest.approx(8.0)
    assert table.verify_seconds(40, 400) == pytest.approx(43.0)
    assert table.plain == dict.fromkeys(CONTEXTS, 1.5) and table.plain_seconds(400) == 1.5
    assert CostTable.load(next(tmp_path.iterdir())) == table
    assert CostTable(table.verify, {}, {}).plain_seconds(400) == 1.0
    assert table.identity["attention"] == "sdpa"
    assert 0 < table.overhead < 1
    costs = table.running(400)
    assert costs.step_seconds(1, 0) == pytest.approx(1.0 + table.overhead)
    assert costs.knows_plain and costs.verify_seconds(1) == 1.0 and costs.verify_seconds(8) == 11.0


def test_the_spread_of_the_repeats_is_kept(target: Any, tmp_path: Path) -> None:
    clock, calls = FakeClock(), itertools.count()
    hook = plant(target, clock, lambda tokens: 1.0 + 0.25 * (next(calls) % 3))
    table = calibrate(target, folder=tmp_path, clock=clock)
    hook.remove()
    for context, row in table.verify.items():
        assert table.verify_range[context].keys() == row.keys()
        assert set(row.values()) == {1.25} and set(table.verify_range[context].values()) == {(1.125, 1.375)}
        assert table.plain[context] == 1.75 and table.plain_range[context] == (1.625, 1.875)
    assert CostTable.load(next(tmp_path.iterdir())) == table


def test_a_table_without_ranges_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"verify": {"9": {"1": 0.5}}, "draft": {}, "identity": {}}))
    table = CostTable.load(path)
    assert table.verify == {9: {1: 0.5}} and table.verify_range == {} and table.plain_range == {}
    path.write_text(json.dumps({"verify": {"9": {"1": 0.5}}, "draft": {}, "identity": {}, "plain_range": {"9": [1]}}))
    with pytest.raises(ValueError, match="Delete it and run"):
        CostTable.load(path)


def spreading(plain: Range, two: Range) -> CostTable:
    """A forward over two nodes costs 1.2 plain ones, over more 1.4."""
    row = {1: 1.0, 2: 1.2, 4: 1.4, 8: 1.4}
    ranges = {nodes: (seconds, seconds) for nodes, seconds in row.items()} | {2: two}
    return CostTable({9: row}, {}, {}, 0.0, {9: 1.0}, {9: ranges}, {}, {9: plain})


def test_a_spread_above_the_differences_is_told_first() -> None:
    quiet = what_must_be_accepted(spreading((0.9, 1.1), (1.2, 1.3)))
    assert quiet.startswith("Cost of verifying, in plain forwards: 2 nodes 1.2,") and "can pay" in quiet
    for noisy in (spreading((0.9, 1.4), (1.2, 1.2)), spreading((1.0, 1.0), (1.0, 1.5))):
        told = what_must_be_accepted(noisy)
        assert told.startswith(
            "TOO NOISY TO TELL: repeats of one forward differ by 0.5 plain forwards, the costs by 0.4"
        )
        assert "can pay" not in told and "4 nodes 1.4" in told
    even = {nodes: 1.0 for nodes in (1, 2, 4, 8)}
    free = CostTable({9: even}, {}, {}, 0.0, {}, {9: dict.fromkeys(even, (0.97, 1.04))})
    assert "can pay" in what_must_be_accepted(free), "costs may be equal, and a small spread changes nothing"


def test_the_measurement_shows_how_far_it_is(target: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(target, folder=tmp_path)
    shown = capsys.readouterr().err
    assert "Measuring what steps cost:   0%" in shown and "23/23" in shown


def test_the_command_prints_the_table_and_what_it_means(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target.save_pretrained(tmp_path / "target")
    monkeypatch.setattr("transformers_resps.calibration.HF_HOME", str(tmp_path))
    assert main(["calibrate", str(tmp_path / "target")]) == 0
    printed = capsys.readouterr().out
    assert "  nodes" in printed and "outside its forwards" in printed and "Cost of verifying, in plain" in printed
    assert "\n  plain  " in printed and " to " in printed
    assert "packed        False" in printed
    assert main(["calibrate", str(tmp_path / "target"), "--pack"]) == 0
    assert "packed        True" in capsys.readouterr().out


def test_a_table_is_measured_once_and_kept(target: Any, head: DraftHead, tmp_path: Path) -> None:
    first = calibrate(target, head, folder=tmp_path)
    assert all(first.draft_range[width][0] <= first.draft[width] <= first.draft_range[width][1] for width in WIDTHS)
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
    [
        "{}",
        "[]",
        "not json",
        "[" * 10**5,
        '{"verify": {"9": {"1": 1e999}}, "draft": {}, "identity": {}}',
        json.dumps({"verify": {"9": {"1": 0.0}}, "draft": {}, "identity": {}}),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"Delete it and run|and run `calibrate"):
        CostTable.load(path)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=r"cost table .* cannot be read .*Check the path"):
            CostTable.load(path)


@pytest.mark.parametrize(
    "values",
    [
        ({"a": {1: 0.1}}, {}, {}),
        ({128: None}, {}, {}),
        ({128: {0: 0.1}}, {}, {}),
        ({0: {1: 0.1}}, {}, {}),
        ({-5: {1: 0.1}}, {}, {}),
        ({128: {1: True}}, {}, {}),
        ({128: {True: 0.1}}, {}, {}),
        ({128: {1: "a"}}, {}, {}),
        ({128: {1: 0.1}}, {0: 0.1}, {}),
        ({128: {1: 0.1}}, None, {}),
        (None, {}, {}),
        ({128: {1: 0.1}}, {}, None),
        ({128: {1: 0.1}}, {}, {}, float("inf")),
        ({128: {1: 0.1}}, {}, {}, "a"),
        ({128: {1: 0.1}}, {}, {}, -0.1),
    ],
    ids=str,
)
def test_a_table_of_other_things_than_sizes_and_seconds_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="sizes below 1 or costs that are no positive numbers.*Measure again with"):
        CostTable(*values)


def test_costs_that_fall_at_the_end_are_not_carried_on_below_the_last_one() -> None:
    falling = {1: 0.02, 24: 0.052, 32: 0.05}
    table = CostTable({128: falling, 768: falling | {32: 0.0499}}, {1: 0.003, 8: 0.002}, {})
    assert table.verify_seconds(200, 128) == table.verify_seconds(32, 128) == 0.05
    assert table.verify_seconds(32, 10**6) == 0.0499
    assert table.draft_seconds(40, 5) == pytest.approx(5 * 0.002)


@pytest.mark.parametrize("clock", [lambda: 7.0, lambda: -time.perf_counter()], ids=["still", "back"])
def test_a_clock_that_does_not_go_forward_is_refused(target: Any, tmp_path: Path, clock: Any) -> None:
    with pytest.raises(ValueError, match="`clock` measured .*must advance.*`time.perf_counter`"):
        calibrate(target, folder=tmp_path, clock=clock)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("positions", [4, 20, 33, 34, 48])
def test_a_target_of_few_positions_is_measured_where_it_has_some(positions: int, tmp_path: Path) -> None:
    short = Architecture("gpt2", {"n_positions": positions, "max_position_embeddings": positions}).build("sdpa")
    table = calibrate(short, folder=tmp_path)
    (context,) = table.verify
    assert context >= 1 and context + max(table.verify[context]) <= positions


def test_a_folder_or_file_may_be_a_string(target: Any, tmp_path: Path) -> None:
    kept = calibrate(target, folder=str(tmp_path))
    kept.save(str(tmp_path / "new" / "table.json"))
    assert CostTable.load(str(tmp_path / "new" / "table.json")) == kept == calibrate(target, folder=tmp_path)


def test_targets_that_hold_no_tree_are_refused_before_they_are_measured(tmp_path: Path) -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=19, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=4))
    for model, message in ((t5, "encoder-decoder.*Call `generate`"), (mamba, "cannot verify sibling nodes")):
        with pytest.raises(ValueError, match=message):
            calibrate(model, folder=tmp_path)
    for pair in ((None,), ("gpt2",), (t5, "head"), (torch.nn.Linear(2, 2),), (type(t5),)):
        with pytest.raises(ValueError, match="needs a loaded causal LM and a `DraftHead`.*got .*Load them"):
            calibrate(*pair, folder=tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_costs_that_are_no_times_are_refused(seconds: float) -> None:
    for verify, draft in (({9: {1: seconds}}, {}), ({9: {1: 1.0}}, {1: seconds})):
        with pytest.raises(ValueError, match="costs that are no positive numbers.*Measure again with `calibrate"):
            CostTable(verify, draft, {})


def test_costs_that_are_not_monotone_stay_so() -> None:
    table = CostTable({100: {1: 0.039, 2: 0.063, 8: 0.066, 32: 0.108}}, {1: 0.002, 4: 0.004}, {})
    assert table.verify_seconds(2, 50) > 0.06 and table.verify_seconds(20, 50) == pytest.approx(0.087)
    assert table.draft_seconds(2, 3) == pytest.approx(3 * (0.002 + 0.002 / 3))
    assert torch.isfinite(torch.tensor(table.verify_seconds(200, 10**6)))
