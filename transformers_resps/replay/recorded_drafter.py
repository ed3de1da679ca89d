"""A drafter that proposes what a recording holds: policies decide on it as they do live."""

from torch import Tensor

from ..drafting.drafter import Drafter
from ..policy import Level, Policy, wants_level
from ..tree import CandidatePool, TreeShape
from .recorded_text import RecordedText


class RecordedDrafter(Drafter):
    """Proposes the recorded pools of one text, position after position.

    Args:
        text: the recording; what is observed must be its own tokens.
    """

    def __init__(self, text: RecordedText) -> None:
        self._text, self._place = text, -1
        self.proposable_tokens = max(text.pools)

    def observe(self, features: Tensor, tokens: Tensor, counts: list[int] | None = None) -> None:
        self._place += tokens.shape[1]
        self.newest_features = features[:, -1]

    def draft(self, shape: TreeShape, policy: Policy) -> CandidatePool:
        """The recorded pool, cut where the policy stops it.

        Raises:
            ValueError: no such pool was recorded.
        """
        top_k = min(shape.top_k, shape.total_tokens - 1)
        pool = self._text.pools.get(top_k)
        if pool is None or shape.depth > int(pool.levels[-1]):
            raise ValueError(
                f"The policy asks for {shape}, but the text was recorded for top_k {sorted(self._text.pools)} and up "
                f"to {self._text.depth} levels. Record it again with `record_pools(..., depths=...)`."
            )
        here = slice(self._place, self._place + 1)
        ends = pool.levels.bincount().cumsum(0).tolist()  # nodes of the first 0, 1, 2, ... levels
        levels, frontier = 1, pool.scores[here, : ends[1]]
        while levels < shape.depth and (not policy.grows or wants_level(policy, Level(levels, frontier))):
            level = pool.scores[here, ends[levels] : ends[levels + 1]]
            frontier = level.topk(min(top_k, level.shape[1])).values
            levels += 1
        tokens, parents, scores = (part[here, : ends[levels]] for part in (pool.tokens, pool.parents, pool.scores))
        return CandidatePool(tokens, parents, scores, pool.levels[: ends[levels]])
