"""Combine several drafters into one, so that the best nodes of all of them form one tree."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tree import CandidatePool
from .drafter import Committed, Drafter, DraftRequest


def together(drafters: Sequence[Drafter]) -> Drafter | None:
    """Combine drafters into one, which calls them in the same order; return `None` if there are no drafters."""
    if len(drafters) < 2:
        return drafters[0] if drafters else None
    return MixedDrafter(drafters)


class MixedDrafter(Drafter):
    """Merges the pools of several drafters. `observe` must get the features of all layers that any of them reads."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._drafters = drafters
        self.feature_layers = sorted({layer for drafter in drafters for layer in drafter.feature_layers})
        self.reads_text = any(drafter.reads_text for drafter in drafters)
        self.drafts_at_once = all(drafter.drafts_at_once for drafter in drafters)
        self.proposable_tokens = max(drafter.proposable_tokens for drafter in drafters)
        levels = [drafter.most_levels for drafter in drafters]
        self.most_levels = None if None in levels else max(filter(None, levels))

    def observe(self, committed: Committed) -> None:
        """Give each drafter the tokens, with only the features that it reads."""
        states = () if committed.features is None else committed.features.chunk(len(self.feature_layers), dim=-1)
        known = dict(zip(self.feature_layers, states, strict=committed.features is not None))
        for drafter in self._drafters:
            own = [known[layer] for layer in drafter.feature_layers]
            drafter.observe(committed._replace(features=torch.cat(own, dim=-1) if own else None))

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        return CandidatePool.merged([drafter.draft(input_ids, request).on_host() for drafter in self._drafters])

    def read(self, at_least: int = 1) -> None:
        for drafter in self._drafters:
            drafter.read(at_least)

    def take_compile_seconds(self) -> float:
        return sum(drafter.take_compile_seconds() for drafter in self._drafters)

    def keep_rows(self, rows: list[int]) -> None:
        for drafter in self._drafters:
            drafter.keep_rows(rows)
