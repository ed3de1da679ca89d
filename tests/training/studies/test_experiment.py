"""The smaller benchmarks as commands, from their options to `results.json`, on a tiny target."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.tools.conversations import save_models, save_rows
from training.studies.batches import main as batches
from transformers_resps import DraftHead


@pytest.mark.parametrize(
    ("command", "options", "ways"),
    [
        (batches, ["--batch-sizes", "1", "2", "9"], {"plain", "ragged", "lockstep", "tree, one by one"}),
    ],
    ids=["batches"],
)
def test_every_way_is_measured_printed_and_kept_with_where_it_was(
    command: Callable[[list[str]], int],
    options: list[str],
    ways: set[str],
    tmp_path: Path,
    tiny_target: PreTrainedModel,
    tiny_head: DraftHead,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, head = save_models(tmp_path, tiny_target, tiny_head)
    file = save_rows(tmp_path / "mine.jsonl", [["defg", "hi"], ["klkl"], ["mnop"]])
    given = [target, head, "--dataset", file, "--limit", "2", "--max-new-tokens", "6", "--repeats", "1"]
    assert command([*given, *options, "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert ways <= {row["way"] for row in found["rows"]}
    assert all(row["same_text"] == 1.0 for row in found["rows"])
    assert found["arguments"]["limit"] == 2 and found["runs"] and {"commit", "device", "threads"} <= found.keys()
    printed = capsys.readouterr().out
    assert all(f"| {way} |" in printed for way in ways)
