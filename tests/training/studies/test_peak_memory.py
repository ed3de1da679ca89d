"""The study of memory: a process for each way, and the ratios to the first."""

import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.tools.conversations import save_models, save_rows
from training.studies.peak_memory import main, table
from transformers_resps import DraftHead


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process")
def test_each_way_decodes_in_a_process_of_its_own(
    tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead, capsys: pytest.CaptureFixture[str]
) -> None:
    target, head = save_models(tmp_path, tiny_target, tiny_head)
    file = save_rows(tmp_path / "mine.jsonl", [["defg", "hi"]])
    given = [target, head, "--dataset", file, "--limit", "1", "--max-new-tokens", "4", "--threads", "1"]
    assert main([*given, "--ways", "auto"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| auto |"))
    _, _, peak, ratio, _ = line.split("|")
    assert 100 < float(peak) < 10_000 and float(ratio) == 1.0  # PyTorch alone takes more than the least


def test_memory_is_compared_with_the_first_way() -> None:
    peaks = {"plain": 500.0, "auto": 600.0}
    rows = table(list(peaks), peaks.__getitem__)
    assert [(row["way"], row["peak_mib"], row["to_first"]) for row in rows] == [
        ("plain", 500.0, 1.0),
        ("auto", 600.0, 1.2),
    ]
