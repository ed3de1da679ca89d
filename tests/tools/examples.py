"""An examination made by hand: numbers and texts that can be checked by eye."""

from dataclasses import replace
from math import log

import torch

from transformers_resps import DraftTree, SpeculationReport, StepRecord, TreeShape
from transformers_resps.telemetry import RowCounts
from transformers_resps.testing import Divergence
from transformers_resps.tools.inspect import Examination, RecordedStep
from transformers_resps.tree import DRAFTED, LOOKED_UP


PREFILL = StepRecord(TreeShape.plain(), 0, 1, RowCounts([0]), RowCounts([1]), 0.0, 0.5, 0.5)
FACTS = {"target": "tiny", "head": "tiny-head", "policy": "FixedPolicy(4/2/2+3)", "dtype": "float32"}
LETTERS = [chr(ord("a") + index) for index in range(26)]


def decode(token_ids: object) -> str:
    """Token 3 is "d"."""
    return "".join(LETTERS[token] for token in token_ids)  # type: ignore[attr-defined]


def merged_step() -> RecordedStep:
    """Root h; the head drafts e (0.5), a (0.25), below e: l (0.4, path 0.2); looked up e l i (0.9, 0.6, 0.3), so only
    i is new.

    The target accepts e and l, then writes p.
    """
    step = RecordedStep(8, 0, 20, [0.9, 0.6, 0.3], TreeShape(4, 2, 2, 3), levels=2)
    tokens = torch.tensor([[7, 4, 0, 11, 8]])
    parents = torch.tensor([[0, 0, 0, 1, 3]])
    scores = torch.tensor([[0.0, log(0.9), log(0.25), log(0.6), log(0.3)]])
    tree = DraftTree.from_parents(tokens, parents, scores)
    step.tree = replace(tree, proposers=[[DRAFTED, DRAFTED | LOOKED_UP, DRAFTED, DRAFTED | LOOKED_UP, LOOKED_UP]])
    step.path = [0, 1, 3]
    step.record = StepRecord(TreeShape(4, 2, 2, 3), 9, 5, RowCounts([2]), RowCounts([3]), 0.010, 0.030, 0.045)
    return step


def plain_step() -> RecordedStep:
    step = RecordedStep(11, 1, 17, [], TreeShape.plain())
    step.tree = DraftTree.root_only(torch.tensor([15]))
    step.path = [0]
    step.record = StepRecord(TreeShape.plain(), 0, 1, RowCounts([0]), RowCounts([1]), 0.0, 0.020, 0.021)
    return step


def examination(plain: str = "helpz", divergence: Divergence | None = None) -> Examination:
    """The prompt is "abc", the answer "h" + "el" + "p" + "z"."""
    steps = [merged_step(), plain_step()]
    report = SpeculationReport(1, [PREFILL, *(step.record for step in steps)], [[7, 4, 11, 15, 25]])
    plain_ids = torch.tensor([LETTERS.index(letter) for letter in plain])
    return Examination(torch.tensor([0, 1, 2]), plain_ids, 2.0, report, 1.0, steps, divergence)
