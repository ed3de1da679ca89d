"""The measurement of batches: what is counted, and that every way writes the same text."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.compilation.as_it_is import compiled_as_it_is
from tests.targets import Architecture
from tests.tools.conversations import save_models, save_rows
from training.studies.batches import WAYS, BatchBench, GroupTiming, main, table
from training.studies.experiment import Experiment
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach


def test_every_way_writes_the_same_tokens_and_is_timed() -> None:
    target = attach(Architecture("llama", {"eos_token_id": 2}).build("sdpa"))
    head = DraftHead.from_target(target)
    clock = itertools.count()
    bench = BatchBench(target, head, lambda: FixedPolicy(TreeShape(6, 2, 3)), 8, lambda: float(next(clock)))
    prompts = [torch.arange(3, 3 + length) for length in (4, 7, 5, 4)]
    runs = list(bench.run(prompts, [1, 2], repeats=1))
    assert [m.way for m in runs].count("plain") == 4 + 2
    assert {m.way for m in runs if m.batch_size == 2} == set(WAYS) - {"stock"}
    assert all(bool(m.steps) == ("plain" not in m.way) for m in runs)
    assert all(m.same == m.batch_size and m.seconds == 1.0 for m in runs)
    for group in range(2):
        assert len({m.tokens for m in runs if m.batch_size == 2 and m.group == group}) == 1


def test_compiled_ways_write_the_tokens_of_stock_decoding() -> None:
    target = attach(Architecture("llama", {"eos_token_id": 2}).build("sdpa"))
    head = DraftHead.from_target(target)
    bench = BatchBench(target, head, lambda: FixedPolicy(TreeShape(6, 2, 3)), 8, compiles=True)
    with compiled_as_it_is() as forwards:
        runs = list(bench.run([torch.arange(3, 3 + length) for length in (4, 7)], [2], repeats=1))
    assert forwards and {m.way for m in runs} == set(WAYS)
    assert all(m.same == 2 for m in runs)


def test_rates_are_total_tokens_over_total_seconds() -> None:
    runs = [
        GroupTiming("plain", 2, 0, 0, 20, 2.0, 2),
        GroupTiming("plain", 2, 1, 0, 10, 4.0, 2),
        GroupTiming("ragged", 2, 0, 0, 20, 1.0, 2),
        GroupTiming("ragged", 2, 1, 0, 10, 2.0, 1),
        GroupTiming("tree, one by one", 2, 0, 0, 30, 4.0, 2),
    ]
    rows = {row["way"]: row for row in table(runs)}
    assert rows["plain"]["tokens_per_second"] == 5.0
    assert rows["ragged"]["to_plain_batch"] == 2.0
    assert rows["ragged"]["to_one_by_one"] == 10.0 / 7.5
    assert rows["ragged"]["same_text"] == 0.75


def test_the_command_prints_every_way_and_keeps_where_it_ran(
    tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead, capsys: pytest.CaptureFixture[str]
) -> None:
    target, head = save_models(tmp_path, tiny_target, tiny_head)
    file = save_rows(tmp_path / "mine.jsonl", [["defg", "hi"], ["klkl"], ["mnop"]])
    options = ["--limit", "2", "--max-new-tokens", "6", "--repeats", "1", "--batch-sizes", "1", "2", "9"]
    assert main([target, head, "--dataset", file, *options, "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["way"] for row in found["rows"]} >= {"plain", "ragged", "lockstep", "tree, one by one"}
    assert all(row["same_text"] == 1.0 for row in found["rows"])
    assert found["arguments"]["limit"] == 2 and found["runs"] and {"commit", "device", "threads"} <= found.keys()
    assert "| tree, one by one |" in capsys.readouterr().out


def test_sizes_that_no_group_fills_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Experiment(None, None, [torch.arange(3)] * 2)
    monkeypatch.setattr(Experiment, "load", lambda args: given)
    with pytest.raises(SystemExit, match="2"):
        main(["target", "head", "--dataset", "prompts.jsonl", "--batch-sizes", "4"])
    said = capsys.readouterr().err
    assert "batch sizes [4] are above the number of prompts, 2" in said and "a larger `--limit`" in said
    assert len(said.splitlines()) == 1
