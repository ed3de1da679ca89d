from pathlib import Path

import pytest
import torch

from benchmarking.journal import JOURNAL, Journal
from tests.tools.measured import step
from transformers_resps import TreeShape
from transformers_resps.tools.results import AnswerTiming, Cell, Run


SETTINGS = {"target": "t", "temperatures": [0.0]}
RUN = Run(
    AnswerTiming("auto", "d/3", 1, 5, 3, 2.5, 2, 0.5, 1.0),
    torch.tensor([4, 5]),
    [step(TreeShape(4, 2, 2), 4, 2, 1.0, 2.0, 4.0)],
)


def test_what_was_kept_is_found_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.keep(RUN)
    journal.note("best", {"shape": [4, 2, 2]})
    again = Journal(tmp_path, SETTINGS)
    found = again.find(Cell("d/3", 2, 0.5, 1), "auto")
    assert found is not None and found.timing == RUN.timing and found.steps == RUN.steps
    assert found.token_ids.tolist() == [4, 5]
    assert again.notes == {"best": {"shape": [4, 2, 2]}}
    for other in (Cell("d/3", 1, 0.5, 1), Cell("d/3", 2, 0.0, 1)):
        assert again.find(other, "auto") is None


def test_a_line_that_a_kill_cut_off_is_measured_again(tmp_path: Path) -> None:
    Journal(tmp_path, SETTINGS).keep(RUN)
    file = tmp_path / JOURNAL
    file.write_text(file.read_text() + '{"method": "au')
    again = Journal(tmp_path, SETTINGS)
    assert len(again.runs) == 1
    again.keep(RUN)
    assert all(line.endswith("}") for line in file.read_text().splitlines())


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Journal(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"other settings: temperatures \[0.0\] \(now \[1.0\]\)\. .*--output"):
        Journal(tmp_path, {**SETTINGS, "temperatures": [1.0]})


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    file = tmp_path / JOURNAL
    file.write_text("{nonsense\n{}\n")
    with pytest.raises(ValueError, match="is damaged .* Delete it"):
        Journal(tmp_path, SETTINGS)
