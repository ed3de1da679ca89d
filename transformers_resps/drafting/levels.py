"""A model over the levels of a tree, one after the other, below one text; and a whole draft as one function."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tree import CandidatePool, DraftTree, TreeShape
from .cache import DraftCache
from .pool_growth import Frontier, Growth, branch, grow_pool, sprout
from .step_model import Entries, Places, StepModel


def at_positions(places: Places, wanted: slice) -> Places:
    """Those of some positions."""
    return tuple(part[:, wanted] for part in places)


class LevelForward:
    """One pass over each level: all its nodes share a position and see only the text and their ancestors.

    What the levels have in common is computed once, before them.

    Args:
        model: drafts for a target.
        cache: holds the text's entries, and room for those of the tree.
        places: of the levels' positions, `[b or 1, depth - 1]`, or these alone: compiled code needs no more.
        length: slots of the text.
        text: `[b or 1, length]` bool, true where a slot is seen; `None` where all are.
        target: what all nodes attend to instead, of a model that has no entries.
    """

    def __init__(
        self,
        model: StepModel,
        cache: DraftCache,
        places: Places | Tensor,
        length: int,
        text: Tensor | None,
        target: Entries | None = None,
    ) -> None:
        self.model, self.cache, self._target = model, cache, target
        self._positions = places if isinstance(places, Tensor) else None
        self._places = None if isinstance(places, Tensor) else places
        self._length, self._text = length, text

    def __call__(self, frontier: Frontier, level: int, is_last: bool) -> Growth:
        """The children of the nodes of `level` that get some; see `branch`."""
        if self._places is None:
            assert self._positions is not None
            self._places = self.model.places(self._positions)
        places = at_positions(self._places, slice(level - 1, level))
        entries = self._target or self._entries(frontier)
        output = self.model.run(0, frontier.tokens, frontier.hidden, places, entries)
        carried = frontier.hidden if self.model.rereads_target else None
        return branch(self.model, frontier, output, is_last, carried=carried)

    def tensors(self, frontier: Frontier, level: int) -> "PassInputs":
        """What a `PassFunction` gets of a level, whose positions are known."""
        tokens, scores, hidden, visible = frontier
        assert hidden is not None and self._positions is not None
        rows, width = tokens.shape
        count = max(width, LEAST_TOKENS)
        if level == 1:  # as many entries as tokens would be compiled apart: some are added that no node sees
            visible = F.pad(visible, (0, count + 1 - width))
        start, seen = -visible.shape[2], self._seen(frontier)
        return PassInputs(
            tokens,
            hidden,
            torch.arange(start, start + width, device=tokens.device).expand(rows, -1),
            self._positions[:, level - 1 : level].expand(rows, width),
            visible,
            (seen if seen.shape[1] > 1 else F.pad(seen, (0, 1))).expand(rows, -1),
            scores if width == count else F.pad(scores, (0, count - width), value=-torch.inf),
            torch.eye(count, dtype=torch.bool, device=tokens.device),
        )

    def _entries(self, frontier: Frontier) -> Entries:
        return self.cache.attend_from(-frontier.visible.shape[-1], self._mask(frontier), end=self._length)

    def _mask(self, frontier: Frontier) -> Tensor | None:
        """`[b, mask copies, w, e + w + length]`."""
        rows, width, _ = frontier.visible.shape
        if self._text is None and width == 1:
            return None
        shape = (rows, self.model.mask_copies, width, -1)
        parts = frontier.visible[:, None], self._seen(frontier)[:, None, None]
        return torch.cat([part.expand(shape) for part in parts], dim=-1)

    def _seen(self, frontier: Frontier) -> Tensor:
        """`[b or 1, length]` bool, true where a slot is seen."""
        if self._text is None:
            self._text = frontier.visible.new_ones(1, self._length)
        return self._text


LEAST_TOKENS = 2  # of a compiled pass: sizes of one would be compiled apart


class PassInputs(NamedTuple):
    """Tokens of one pass, of which the last q get children. All that a text has written before lies in a cache.

    Attributes:
        tokens: `[b, t]`.
        hidden: `[b, t, h]` what they are paired with; or `[b, t, F]` the target's features, which the pass fuses.
        slots: `[b, t]` where their entries go; those of a tree are negative, and see the whole text.
        positions: `[b, t]`.
        drafted: `[b, t, e]` bool: which of the e newest entries of the tree a token sees, the own ones included.
        seen: `[b, s]` bool, false where a slot of the text is hidden from all tokens but its own.
        scores: `[b, q]` as the pool has them.
        itself: `[k, k]` bool: what each of the k children sees of them.
    """

    tokens: Tensor
    hidden: Tensor
    slots: Tensor
    positions: Tensor
    drafted: Tensor
    seen: Tensor
    scores: Tensor
    itself: Tensor

    def filled_up(self) -> "PassInputs":
        """With the last token repeated where there are too few."""
        return PassInputs._make((*filled_up(self[:5]), *self[5:]))

    def example(self) -> list[Tensor]:
        """Of sizes that all differ: equal ones would be compiled as always equal."""
        tokens, hidden, slots, positions, drafted, seen, scores, itself = self
        rows, asking, children, count, entries, length = min(len(tokens), 2), 3, 4, 5, 7, 11
        return [
            tokens[:1, :1].expand(rows, count),
            hidden[:1, :1].expand(rows, count, -1),
            torch.arange(-entries, count - entries, device=slots.device).expand(rows, -1),
            positions[:1, :1].expand(rows, count),
            drafted.new_ones(rows, count, entries),
            seen.new_ones(rows, length),
            scores.new_zeros(rows, asking),
            torch.eye(children, dtype=torch.bool, device=itself.device),
        ]


def filled_up(parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors `[b, t, ...]` with the last token repeated where there are too few."""
    missing = LEAST_TOKENS - parts[0].shape[1]
    return [part if missing <= 0 else part[:, -1:].expand(-1, LEAST_TOKENS, *part.shape[2:]) for part in parts]


class PassFunction:
    """One pass, and the children of its last tokens, as a function of tensors: of newest pairs or of a level.

    Args:
        model: drafts for a target.
        tree_room: of the cache.
        fuses: whether it gets features, as those of newest pairs.
    """

    # The dimensions of its inputs that change, beside those of rows, which all have but the last
    dynamic = ((1,), (1,), (1,), (1,), (1, 2), (1,), (1,), (0, 1))

    def __init__(self, model: StepModel, tree_room: int, *, fuses: bool) -> None:
        self._model, self._tree_room, self._fuses = model, tree_room, fuses

    def __call__(
        self,
        tokens: Tensor,
        hidden: Tensor,
        slots: Tensor,
        positions: Tensor,
        drafted: Tensor,
        seen: Tensor,
        scores: Tensor,
        itself: Tensor,
        *buffers: Tensor,
    ) -> tuple[Tensor, Growth]:
        """Run it over `PassInputs` and the buffers of a cache, which are written.

        Returns:
            The model's outputs `[b, q, h]`, and the growth of the tokens that get children.
        """
        model, cache = self._model, DraftCache(buffers, self._tree_room)
        (rows, count), asking = tokens.shape, scores.shape[1]
        first, looking = count - asking, count if model.needs_all_queries else asking
        # Slices in place of these numbers would be compiled for their sizes alone
        looks, wanted = (torch.arange(start, count, device=tokens.device) for start in (count - looking, first))
        own, order = slots.index_select(1, looks)[..., None], torch.arange(seen.shape[1], device=tokens.device)
        text = seen[:, None] & ((own < 0) | (order <= own)) | (order == own)  # padding sees itself: never NaN
        mask = torch.cat([drafted.narrow(1, count - looking, looking), text], dim=-1)
        mask = mask[:, None].expand(-1, model.mask_copies, -1, -1)
        entries = cache.attend_at(slots, seen.shape[1], mask, first=-drafted.shape[2])
        fused = model.fuse(hidden) if self._fuses else hidden
        output = model.run(0, tokens, fused, model.places(positions), entries, wanted=wanted.expand(rows, -1))
        frontier = Frontier(tokens.narrow(1, first, asking), scores, None, drafted.narrow(1, first, asking))
        return output, branch(model, frontier, output, False, itself=itself.expand(rows, -1, -1))

    @staticmethod
    def scores(outputs: tuple[Tensor, Growth]) -> Tensor:
        """The pool's, of what a call returns."""
        return outputs[1].scores


class DepthForward:
    """The levels of a model with several depths: level m + 1 comes from depth m, over the nodes of levels 1 to m.

    A depth has entries of its own, so the nodes above a level go through it, too. It pairs them with what the depth
    before carries on from their parents.

    Args:
        model: of several depths.
        cache: holds the text's entries, and room for those of the tree.
        places: of the levels' positions, `[b or 1, depths - 1]`.
        length: slots of the text.
        texts: of each depth, `[b or 1, length]` bool, true where a slot is seen.
        carried: of each depth, what it carries on from the root, `[b, 1, h]`.
    """

    def __init__(
        self,
        model: StepModel,
        cache: DraftCache,
        places: Places,
        length: int,
        texts: Sequence[Tensor],
        carried: Sequence[Tensor],
    ) -> None:
        self._model, self._cache, self._places, self._length = model, cache, places, length
        self._texts, self._of_root = texts, carried
        self._above: list[Frontier] = []  # the newest level first, as all that follows
        self._origins: list[Tensor] = []  # [b, w] of each level but the first, the places of its nodes' parents
        self._carried: list[Tensor] = []  # [b, w, h] of each level, by the depth before

    def __call__(self, frontier: Frontier, level: int, is_last: bool) -> Growth:
        """The children of the nodes of `level` that get some; see `branch`."""
        assert frontier.hidden is not None
        nodes, width = [frontier, *self._above], frontier.tokens.shape[1]
        above = [
            carried.gather(1, origin[..., None].expand(-1, -1, carried.shape[-1]))
            for origin, carried in zip(self._origins[1:], self._carried[1:], strict=True)
        ]
        if self._above:
            above.append(self._of_root[level - 1].expand(-1, width, -1))
        hidden = torch.cat([frontier.hidden, *above], dim=1)
        entries = self._cache.attend_from(-width * level, self._mask(nodes, level), end=self._length)
        order = torch.arange(level - 1, -1, -1, device=hidden.device).repeat_interleave(width)
        places = tuple(part[:, order] for part in self._places)
        output = self._model.run(level, torch.cat([one.tokens for one in nodes], dim=1), hidden, places, entries)
        carried = hidden if self._model.rereads_target else self._model.feedback(output)
        growth = branch(self._model, frontier, output[:, :width], is_last, carried=carried[:, :width], depth=level)
        self._above, self._carried = nodes, list(carried.split(width, dim=1))
        if growth.best is not None:
            self._origins.insert(0, growth.best.div(width, rounding_mode="floor"))
        return growth

    def _mask(self, nodes: Sequence[Frontier], level: int) -> Tensor:
        """`[b, 1, w * level, w * level + length]`: no node sees those of later levels."""
        rows, width = nodes[0].tokens.shape
        seen = torch.cat([F.pad(one.visible, (width * later, 0)) for later, one in enumerate(nodes)], dim=1)
        text = self._texts[level][:, None].expand(rows, width * level, -1)
        return torch.cat([seen, text], dim=-1)[:, None]


class NewestPairs(NamedTuple):
    """Pairs that a draft reads first, as tensors whose sizes may be fixed.

    Attributes:
        features: `[b, m, F]` of the newest m pairs, the newest last. A row that has fewer begins with any values.
        tokens: `[b, m]` of the pairs.
        slots: `[b, m]` where the pairs go, ascending. A pair that is none goes to the cache's last slot, which no text
            may reach.
        positions: `[b, m]` of the pairs: their slots, and what was forgotten before slot 0.
        shown: `[b or 1, s or 1]` bool, false where a slot of the text is padding, and any value after the text.
    """

    features: Tensor
    tokens: Tensor
    slots: Tensor
    positions: Tensor
    shown: Tensor


class ReadText(NamedTuple):
    """A text that is read, and what follows it.

    Attributes:
        cache: holds its entries, and room for those of a draft.
        length: slots of the cache that hold it.
        places: of the positions after it.
        seen: `[b or 1, length]` bool, true where a slot is seen; `None` where all are.
        ends: `[b or 1, 1]` the slot after each row's text; `None` where that is `length` of all.
    """

    cache: DraftCache
    length: int
    places: Places
    seen: Tensor | None
    ends: Tensor | None


def read_pairs(
    model: StepModel, cache: DraftCache, pairs: NewestPairs, length: int, ahead: int
) -> tuple[Tensor, ReadText]:
    """Read pairs into the first `length` slots of a cache. Returns the model's output `[b, 1, h]` at the newest, and
    the text with the places of `ahead` positions.
    """
    features, tokens, slots, positions, shown = pairs
    width, order, ends = tokens.shape[1], torch.arange(length, device=slots.device), slots[:, -1:] + 1
    later = positions[:, -1:] + 1 + torch.arange(ahead, device=slots.device)
    places = model.places(torch.cat([positions, later], dim=1))
    here, after = at_positions(places, slice(width)), at_positions(places, slice(width, None))
    queries = width if model.needs_all_queries else 1
    mask = (order <= slots[:, -queries:, None]) & shown[:, None]
    entries = cache.attend_at(slots, length, mask[:, None])
    newest = model.run(0, tokens, model.fuse(features), here, entries, wanted=slice(-1, None))
    return newest, ReadText(cache, length, after, (order < ends) & shown, ends)


class DraftFunction:
    """Reads the newest pairs, grows a pool and builds its tree, without a decision on values in between.

    Every size is fixed by the shape, the number of pairs and the capacity of the cache; the text's length is a
    value. It gives what a drafter and `DraftTree.from_pool` give.

    `tree_room` is that of the cache, as much as the shape's draft needs.
    """

    def __init__(self, model: StepModel, shape: TreeShape, tree_room: int) -> None:
        self._model, self._shape, self._tree_room = model, shape, tree_room

    def __call__(
        self, features: Tensor, tokens: Tensor, slots: Tensor, positions: Tensor, shown: Tensor, *buffers: Tensor
    ) -> tuple[Tensor, ...]:
        """Draft below the last of the tokens, see `NewestPairs`; the buffers of the cache are written in place.

        Returns:
            The model's output `[b, 1, h]` at the newest pair, the tensors of `CandidatePool` without its levels, then
            those of `DraftTree`; see `unpack`.
        """
        pairs = NewestPairs(features, tokens, slots, positions, shown)
        newest, pool = self._draft(pairs, DraftCache(buffers, self._tree_room))
        tree = DraftTree.from_pool(tokens[:, -1], pool, self._shape.total_tokens, self._shape.depth)
        ranked = tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores
        return newest, pool.tokens, pool.parents, pool.scores, *ranked

    def _draft(self, pairs: NewestPairs, cache: DraftCache) -> tuple[Tensor, CandidatePool]:
        """The model's output at the newest pair, and the pool."""
        model, depth = self._model, self._shape.depth
        newest, text = read_pairs(model, cache, pairs, cache.capacity, max(depth - 1, 1))
        first = sprout(model, newest, self._width, depth == 1)
        return newest, grow_pool(first, depth, LevelForward(model, cache, text.places, text.length, text.seen))

    @property
    def _width(self) -> int:
        return min(self._shape.top_k, self._model.proposable_tokens)

    @property
    def level_sizes(self) -> list[int]:
        """Nodes of each level of the pool."""
        return [self._width] + [self._width**2] * (self._shape.depth - 1)

    @staticmethod
    def scores(outputs: tuple[Tensor, ...]) -> Tensor:
        """The pool's, of what a call returns."""
        return outputs[3]

    def unpack(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, CandidatePool, DraftTree]:
        """The model's output, the pool and the tree that a call returns."""
        newest, pool_tokens, pool_parents, pool_scores, tokens, parents, depths, ancestors, scores = outputs
        level_count = min(self._shape.depth, tokens.shape[1] - 1)
        tree = DraftTree(tokens, parents, depths, ancestors, scores, level_count)
        return newest, CandidatePool(pool_tokens, pool_parents, pool_scores, numbered(self.level_sizes)), tree


def numbered(sizes: Sequence[int]) -> Tensor:
    """The level of each node of a pool, 1 for the first, from the sizes of its levels."""
    return torch.arange(1, len(sizes) + 1).repeat_interleave(torch.tensor(sizes))
