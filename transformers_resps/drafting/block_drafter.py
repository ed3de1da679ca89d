"""Drafts with a model that fills a block of slots in one pass."""

from torch import Tensor

from ..tree import CandidatePool, DraftTree, TreeShape
from .blocks import BlockFunction, BlockInputs, BlockModel, bounds, draft_block
from .drafter import DraftRequest
from .engine import DraftEngine
from .level_drafter import LevelDrafter
from .levels import LEAST_TOKENS, NewestPairs, ReadText


class BlockDrafter(LevelDrafter):
    """Drafts all levels with one pass of a `BlockModel`; see `LevelDrafter` for the arguments.

    A shape's `top_k` is the most children of a node. A level keeps as many nodes as the tree may have.
    """

    drafts_at_once = True
    _model: BlockModel
    _function = BlockFunction

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        """As `Drafter.draft`. All levels come from one pass, so the policy is not asked whether to go on."""
        model, most = self._model, max(request.shape.total_tokens - 1, 1)
        top_k = min(request.shape.top_k, most, model.most_children)
        shape = TreeShape(most + 1, min(request.shape.depth, model.block_levels), top_k)
        if self._engine is not None and not self._engine.is_broken:
            pool = self._draft_at_once(self._engine, shape)
            if pool is not None:
                return pool
        self.built_tree = None
        count, device = model.width(shape.depth), self._device
        ahead, _ = self._read(ahead=count)
        length = self._slots.length
        self._cache.reserve(length, tree=count)
        seen = self._slots.visible(length, device)
        ends = None if seen is None else self._slots.ends(device)
        text = ReadText(self._cache, length, self._places.at(ahead), seen, ends)
        root, edges = input_ids[:, -1].to(device), bounds(shape, self._rows, device)
        return draft_block(model, self._newest, root, shape.depth, text, *edges).pool(shape)

    def _launch(
        self, engine: DraftEngine, shape: TreeShape, read: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, CandidatePool, DraftTree | None] | None:
        if engine.captures:
            return super()._launch(engine, shape, read)
        length = max(self._slots.length, LEAST_TOKENS)
        shown = self._slots.visible(length, self._device)
        pairs = NewestPairs(*read, (self._all_shown if shown is None else shown).expand(self._rows, length))
        inputs = BlockInputs(pairs, *bounds(shape, self._rows, self._device))
        filled = engine.fill(self._cache, inputs, self._model.block_levels)  # of which fewer are the first ones
        return None if filled is None else (filled[0], filled[1].pool(shape), None)

    def _tree_room(self, shape: TreeShape) -> int:
        return self._model.block_levels + 1
