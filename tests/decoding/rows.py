"""Padded prompts of unequal lengths, calls over them, and how unevenly their rows advanced."""

from itertools import pairwise
from typing import Any

import torch

from tests.targets import VOCABULARY
from transformers_resps import FixedPolicy, Observation, Policy, StepRecord, TreeShape


WIDE = TreeShape(40, 3, VOCABULARY)


class AnyShape(Policy):
    """Draws another shape at every step, with lookups and plain steps among them."""

    needs_head = False

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def _number(self, high: int) -> int:
        return int(torch.randint(0, high, (), generator=self.generator))

    def choose(self, observation: Observation) -> TreeShape:
        shape = (1 + self._number(40), self._number(5), 1 + self._number(VOCABULARY))
        return TreeShape(*shape, lookup=self._number(2) * self._number(5))


class Noted(FixedPolicy):
    """Keeps the records of its steps, also of calls that return texts alone."""

    def __init__(self, shape: TreeShape) -> None:
        super().__init__(shape)
        self.steps: list[StepRecord] = []

    def observe(self, record: StepRecord) -> None:
        self.steps.append(record)

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept, over all rows and steps."""
        return sum(sum(step.accepted) for step in self.steps)


def prompts(seed: int, rows: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left to one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    pads = torch.randint(0, length, (rows, 1), generator=generator)
    mask = (torch.arange(length) >= pads).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def uneven_steps(report: Any) -> int:
    """Count steps in which two rows gained different numbers of tokens and went on afterwards."""
    return sum(
        len({count for count, later in zip(step.emitted, following.emitted, strict=True) if later}) > 1
        for step, following in pairwise(report.steps)
    )


def speculate(target: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return target.generate(**inputs, return_dict_in_generate=True, **{"max_new_tokens": 24} | options)
