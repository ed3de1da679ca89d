"""What drafts in one call: the drafter of one source, or of several whose nodes compete for the places of one tree."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads import DraftSource, StepModel
from ..policies.base import Policy
from ..tree import CandidatePool, TreeShape
from ..verifying.verifier import Verifier
from .drafter import Drafter
from .engine import DraftEngine
from .level_drafter import LevelDrafter


class DraftPart(NamedTuple):
    """One source as it drafts in a call.

    Attributes:
        source: what the user passed.
        model: the source, bound to the target.
        engine: lent to the call; `None` drafts without compiled code.
    """

    source: DraftSource
    model: StepModel
    engine: DraftEngine | None = None


def drafter_of(
    parts: Sequence[DraftPart],
    verifier: Verifier,
    rows: int,
    *,
    paired_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Drafter | None:
    """What drafts for so many rows; `None` without parts.

    Args:
        parts: in the order in which they are asked.
        verifier: of the call.
        rows: decoded together.
        paired_mask: `[b, s]`, 0 where the prompt is padding, of the positions whose features are known.
        text_mask: likewise of those whose tokens are known.
    """
    drafters = []
    for _, model, engine in parts:
        entries = partial(model.target_entries, verifier) if model.reads_target else None
        mask = paired_mask if model.reads_features else text_mask
        drafters.append(LevelDrafter(model, rows, mask, engine, entries))
    if len(parts) < 2:
        return drafters[0] if drafters else None
    return MixedDrafter(drafters, [part.source.feature_layers for part in parts])


class MixedDrafter(Drafter):
    """Merges what several drafters propose below the same roots; see `CandidatePool.merged`.

    Args:
        drafters: at least two.
        feature_layers: of each, the layers that it reads; all that it is shown are of all of them, in their order.
    """

    def __init__(self, drafters: Sequence[Drafter], feature_layers: Sequence[Sequence[int]]) -> None:
        self._drafters, self._reads = drafters, feature_layers
        self._layers = sorted({layer for layers in feature_layers for layer in layers})
        self.proposable_tokens = max(drafter.proposable_tokens for drafter in drafters)

    def observe(
        self, tokens: Tensor, features: Tensor | None = None, rows: Sequence[Sequence[int]] | None = None
    ) -> None:
        states = () if features is None else features.chunk(len(self._layers), dim=-1)
        known = dict(zip(self._layers, states, strict=features is not None))
        for drafter, layers in zip(self._drafters, self._reads, strict=True):
            own = torch.cat([known[layer] for layer in layers], dim=-1) if layers else None
            drafter.observe(tokens, own, rows)

    def draft(self, shape: TreeShape, policy: Policy) -> CandidatePool:
        """As `Drafter.draft`, on the host."""
        return CandidatePool.merged([drafter.draft(shape, policy).on_host() for drafter in self._drafters])

    def read(self, at_least: int = 1) -> None:
        for drafter in self._drafters:
            drafter.read(at_least)

    def take_compile_seconds(self) -> float:
        return sum(drafter.take_compile_seconds() for drafter in self._drafters)

    def keep_rows(self, rows: list[int]) -> None:
        for drafter in self._drafters:
            drafter.keep_rows(rows)
