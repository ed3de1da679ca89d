"""The study of huge pages decodes with both kinds, and nothing moves where pages are to be small."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from training.studies.experiment import Experiment
from training.studies.huge_pages import HUGE, SMALL, in_pages, measure, table
from transformers_resps import DraftHead, attach
from transformers_resps.compilation.pages import Kernel


def test_both_kinds_of_pages_write_the_same_text_in_every_way(
    tiny_target: PreTrainedModel, tiny_head: DraftHead
) -> None:
    given = Experiment(attach(tiny_target), tiny_head, [torch.arange(5, 12), torch.arange(3, 9)])
    runs = [run for some in measure({SMALL: given, HUGE: given}, 6, 2, compiles=False) for run in some]
    assert len(runs) == 2 * 2 * 2 * 2 and all(run.same and run.step_seconds for run in runs)
    rows = table(runs)
    assert [(row["way"], row["pages"]) for row in rows] == [
        ("plain", SMALL),
        ("plain", HUGE),
        ("auto", SMALL),
        ("auto", HUGE),
    ]
    assert rows[0]["to_small"] == rows[2]["to_small"] == 1.0 and all(row["step_ms"] > 0 for row in rows)


def test_nothing_moves_while_pages_are_to_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "has_huge_pages", lambda self: True)
    with in_pages(SMALL):
        assert not Kernel(Path("/")).has_huge_pages()
    with in_pages(HUGE):
        assert Kernel().has_huge_pages()
    assert Kernel().has_huge_pages()
