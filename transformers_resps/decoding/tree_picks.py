"""What a text would pick at every node of a tree, told before anybody knows which nodes it comes to.

For texts of one row. Rows in lockstep draw together, and those that have ended go on drawing: they are asked in commit
order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tree import DraftTree
from .draws import Draws, draws_alike


@dataclass(frozen=True, slots=True)
class TreePicks:
    """The picks of one row at all nodes of its tree.

    Attributes:
        tokens: `[n]`; -1 where the scores allow no draw.
        logits: `[n, v]` fp32, the target's.
        scores: `[n, v]` fp32, processed.
        draws: the random numbers of the levels; `None` for greedy picks.
    """

    tokens: Tensor
    logits: Tensor
    scores: Tensor
    draws: Draws | None

    @classmethod
    def of(cls, logits: Tensor, scores: Tensor, tree: DraftTree, *, do_sample: bool) -> "TreePicks":
        """Pick at each of n nodes from its processed scores `[n, v]`."""
        if not do_sample:
            return cls(scores.argmax(dim=-1), logits, scores, None)
        draws = Draws(tree.level_count + 1, scores)
        return cls(draws.pick(scores, tree.depths[0]), logits, scores, draws)

    def settle(self, tokens: list[int]) -> None:
        """Give back the random numbers that the committed `tokens` did not use.

        Raises:
            RuntimeError: no token could be drawn at a committed position.
        """
        if self.draws is None:
            return
        if min(tokens) < 0:
            raise RuntimeError(
                "No token can be drawn, because the processed scores hold NaN, +inf or nothing but -inf. Check the "
                "logits processors, and the dtype of the target."
            )
        self.draws.give_back(len(tokens))


def can_pick_at_once(device: torch.device, do_sample: bool, vocabulary: int) -> bool:
    """Whether picking at all nodes of a tree is right and pays. On a CPU a read is free, and nodes off the path would
    only cost.
    """
    return device.type != "cpu" and (not do_sample or draws_alike(device, vocabulary))
