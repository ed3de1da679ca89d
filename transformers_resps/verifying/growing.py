"""Verify trees with a dynamic cache, which grows at each step; calls without compiled code use this mode."""

import torch
from torch import Tensor

from ..tree import DraftTree
from .cache import compact, compact_ragged, crop, keep_rows, preallocate, visible_entries
from .forward import Features, TargetForward
from .hybrids import RecurrentMixers
from .masks import Masks, tree_attention_mask, tree_positions
from .rows import RowEnds
from .verifier import TargetEntries, Verifier, VerifyingMode, layers_by_kind


class TreeVerifier(Verifier):
    """Verifies trees with a dynamic cache: appends all nodes' entries, then keeps only the accepted nodes' entries."""

    def __init__(self, forward: TargetForward, rows: RowEnds) -> None:
        super().__init__(forward, rows)
        self._mixers = RecurrentMixers(forward.target, forward.cache)
        self.reads_paths = bool(self._mixers)
        self._newest_nodes = 0  # nodes of the newest tree, with padding; 0 once it was kept or undone

    def _begin_steps(self) -> None:
        preallocate(self.forward.cache)

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """Run one forward over the tree. A tree of only the root gets the mask of plain decoding, if possible."""
        slides = (getattr(layer, "is_sliding", False) for layer in self.forward.cache.layers)
        if tree.node_count == 1 and (self.rows.slots.is_even or not any(slides)):
            mask: Masks = self.rows.prompt_mask(self.length + 1)
        else:
            mask = self._tree_mask(tree)
        positions = tree_positions(tree, self._roots())
        with self._mixers.reading(tree) as options:
            outputs, features = self.forward.verify(tree.tokens, mask, positions, **options)
        self._newest_nodes = tree.node_count
        return outputs.logits, features

    def _tree_mask(self, tree: DraftTree) -> Masks:
        target, prefix_mask = self.forward.target, self.rows.prompt_mask(self.length)
        ends = None if self.rows.slots.is_even else self.rows.slots.ends(tree.tokens.device)
        return tree_attention_mask(target.config, self.forward.cache, prefix_mask, tree, target.dtype, ends)

    def _roots(self) -> Tensor | float:
        """Return the position ids of the next tree's roots, `[..., b, 1]`, or one number for all rows."""
        return (self.length if self.rows.slots.is_even else self.rows.slots.ends(self.device)) + self.rows.shift

    def target_entries(self) -> TargetEntries:
        root = DraftTree.root_only(torch.zeros(len(self.rows), dtype=torch.long, device=self.device))
        mask, owners = self._tree_mask(root), layers_by_kind(self.forward, self.forward.cache)
        masks = mask if isinstance(mask, dict) else dict.fromkeys(owners, mask)
        return TargetEntries(
            {kind: visible_entries(self.forward.cache, index) for kind, index in owners.items()},
            {kind: mask[..., :-1] for kind, mask in masks.items() if mask is not None and kind in owners},
            tree_positions(root, self._roots()),
        )

    def undo(self) -> None:
        crop(self.forward.cache, self._newest_nodes)
        self._mixers.drop()
        self._newest_nodes = 0

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        self._mixers.keep(path)
        cache, counts = self.forward.cache, list(map(len, paths))
        if self.rows.slots.stays_even([counts]):
            is_front = paths == [list(range(counts[0]))] * len(paths)
            compact(cache, path, self._newest_nodes, is_front=is_front)
            self.rows.slots.extend(counts)
        else:
            compact_ragged(cache, path, self._newest_nodes, self.rows.slots.take([counts], path.device), self.length)
        self._newest_nodes = 0

    def keep_rows(self, rows: list[int]) -> None:
        self.rows.keep_rows(rows)
        keep_rows(self.forward.cache, rows, self.length)
        self.forward.keep_rows(rows)

    def close(self) -> None:
        """See `Verifier.close`. A newest tree of only a root is kept if it has already changed recurrent states."""
        if self._mixers and self._newest_nodes == 1:
            self.rows.slots.extend([1] * len(self.rows))
            crop(self.forward.cache, 0)
        super().close()


class GrowingMode(VerifyingMode):
    """Makes verifiers that use a dynamic cache, without compiled code."""

    def __str__(self) -> str:
        return "growing cache"

    def compose(self, forward: TargetForward, rows: RowEnds, engine: object, gives_back: bool) -> TreeVerifier:
        return TreeVerifier(forward, rows)
