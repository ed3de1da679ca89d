"""The same call plain and with trees, on a target that keeps recurrent states; and what makes the comparison count."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import set_seed

from tests.recurrent_targets import VOCABULARY
from transformers_resps import Observation, Policy, SpeculationReport, TreeShape


SAMPLED = {"do_sample": True, "temperature": 0.9}


class AnyShape(Policy):
    """Draws another shape at every step, of `shapes` or wide ones of some breadth, deep, chains, looked up, plain."""

    needs_head = False

    def __init__(self, seed: int, breadth: int = VOCABULARY, shapes: Sequence[TreeShape] = ()) -> None:
        self.breadth, self.shapes = breadth, shapes
        self.generator = torch.Generator().manual_seed(seed)

    def _number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def choose(self, observation: Observation) -> TreeShape:
        if self.shapes:
            return self.shapes[self._number(0, len(self.shapes))]
        depth, top_k = ((0, 1), (2, self.breadth), (3, self.breadth), (2, self.breadth), (5, 1), (4, 2))[
            self._number(0, 6)
        ]
        return TreeShape(self._number(4, 40), depth, top_k, lookup=self._number(0, 2) * self._number(0, 6))


def tokens(count: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def padded(rows: int, seed: int = 0, length: int = 9) -> dict[str, torch.Tensor]:
    """Prompts padded on the left; the first is not."""
    mask = (torch.arange(length) >= torch.tensor([[0], [4], [7]])[:rows]).long()
    return {"input_ids": tokens(length, seed, rows) * mask, "attention_mask": mask}


def answer(target: Any, inputs: Any, seed: int = 0, **options: Any) -> Any:
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    set_seed(seed)
    return target.generate(**inputs, return_dict_in_generate=True, **{"max_new_tokens": 14} | options)


def compare(target: Any, head: Any, inputs: Any, seed: int = 0, **options: Any) -> SpeculationReport:
    """Check that a call with trees is the plain one, and drew as many random numbers; its report.

    Args:
        target: attached.
        head: of the call with trees.
        inputs: a prompt, or keywords.
        seed: of both calls.
        options: of both calls; `lockstep`, `policy`, `use_mtp` and `compile` of the one with trees.
    """
    ours = {name: options.pop(name) for name in ("lockstep", "policy", "use_mtp", "compile") if name in options}
    plain = answer(target, inputs, seed, **options)
    drawn = torch.get_rng_state()
    found = answer(target, inputs, seed, **options, **{"assistant_model": head, "policy": AnyShape(seed)} | ours)
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert torch.equal(torch.get_rng_state(), drawn)
    report: SpeculationReport = found.speculation
    return report


def check_counts(*reports: SpeculationReport, in_a_row: int = 2) -> None:
    """A comparison proves something where drafts were accepted, some of them in one step, and others were not."""
    steps = [step for report in reports for step in report.steps[1:]]
    accepted = sum(step.accepted_total for step in steps)
    drafted = sum((step.verified - 1) * len(step.accepted) for step in steps)
    assert 0 < accepted < drafted, f"{accepted} of {drafted} drafted tokens were accepted: nothing was compared"
    longest = max(max(step.accepted) for step in steps)
    assert longest >= in_a_row, f"no step accepted more than {longest} tokens"
