"""Verify trees over a dynamic cache, which grows: what eager calls do."""

from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..tree import DraftTree
from .attention import tree_attention_mask, tree_positions
from .cache import (
    compact,
    compact_ragged,
    crop,
    has_windows,
    keep_rows,
    preallocate,
    visible_entries,
)
from .forward import Features, TargetForward
from .hybrids import RecurrentMixers
from .verifier import TargetEntries, Verifier


class TreeVerifier(Verifier):
    """Verifies trees over a dynamic cache: a tree's entries follow the text's, and the accepted ones move up."""

    def __init__(self, forward: TargetForward, position_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        super().__init__(forward, position_ids, attention_mask)
        self._mixers = RecurrentMixers(forward.target, self._cache)
        self.reads_paths = bool(self._mixers)
        self._newest_nodes = 0  # nodes of the newest forward, padding included; 0 once it is settled

    @classmethod
    def of(
        cls,
        target: PreTrainedModel,
        prompt_length: int,
        layers: list[int] | None = None,
        *,
        before_deepstack: bool = False,
    ) -> "TreeVerifier":
        """For prompts of one length, without padding; the cache is a new, dynamic one. See `FeatureTap` for the rest,
        which is what a source reads.
        """
        forward = TargetForward.of(target, layers or None, before_deepstack=before_deepstack)
        return cls(forward, torch.arange(prompt_length, device=target.device)[None])

    def __enter__(self) -> Self:
        super().__enter__()
        self._mixers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            super().__exit__(*exception)
        finally:
            self._mixers.__exit__()

    def _begin_steps(self) -> None:
        preallocate(self._cache)

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """As `Verifier.verify`. A lone root gets plain decoding's mask."""
        if tree.node_count == 1 and (self._slots.is_even or not has_windows(self._cache)):
            mask: Any = self._prefix_mask(self.length + 1)
        else:
            mask = self._tree_mask(tree)
        positions = tree_positions(tree, self._roots())
        with self._mixers.reading(tree) as options:
            outputs, features = self._forward.verify(tree.tokens, mask, positions, **options)
        self._newest_nodes = tree.node_count
        return outputs.logits, features

    def _tree_mask(self, tree: DraftTree) -> Tensor | dict[str, Tensor | None]:
        target, prefix_mask = self._forward.target, self._prefix_mask(self.length)
        ends = None if self._slots.is_even else self._slots.ends(tree.tokens.device)
        return tree_attention_mask(target.config, self._cache, prefix_mask, tree, target.dtype, ends)

    def _roots(self) -> Tensor | float:
        """The positions of the coming roots: one, or `[..., b, 1]`."""
        return (self.length if self._slots.is_even else self._slots.ends(self.device)) + self._shift

    def target_entries(self) -> TargetEntries:
        root = DraftTree.root_only(torch.zeros(len(self._shifts), dtype=torch.long, device=self.device))
        mask, owners = self._tree_mask(root), self._owners()
        masks = mask if isinstance(mask, dict) else dict.fromkeys(owners, mask)
        return TargetEntries(
            {kind: visible_entries(self._cache, index) for kind, index in owners.items()},
            {kind: mask[..., :-1] for kind, mask in masks.items() if mask is not None and kind in owners},
            tree_positions(root, self._roots()),
        )

    def undo(self) -> None:
        crop(self._cache, self._newest_nodes)
        self._mixers.drop()
        self._newest_nodes = 0

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        self._mixers.keep(path)
        counts = list(map(len, paths))
        if self._slots.stays_even([counts]):
            is_front = paths == [list(range(counts[0]))] * len(paths)
            compact(self._cache, path, self._newest_nodes, is_front=is_front)
            self._slots.extend(counts)
        else:
            slots = self._slots.take([counts], path.device)
            compact_ragged(self._cache, path, self._newest_nodes, slots, self.length)
        self._newest_nodes = 0

    def keep_rows(self, rows: list[int]) -> None:
        self._slots.keep_rows(rows)
        self._shift_by([self._shifts[row] for row in rows])
        keep_rows(self._cache, rows, self.length)
        self._forward.keep_rows(rows)

    def close(self) -> None:
        """As `Verifier.close`. A lone root that was verified stays, as after an interrupted plain step: no state can
        forget it.
        """
        if self._mixers and self._newest_nodes == 1:
            self._slots.extend([1] * len(self._shifts))
            crop(self._cache, 0)
        super().close()
