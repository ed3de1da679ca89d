"""The forward passes of a draft model, each a function of tensors, and the loop over passes that makes a draft.

The same function runs eagerly and compiled, and a CUDA graph captures the whole loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tree import CandidatePool, DraftTree, TreeShape
from .cache import DraftCache
from .drafter import GoesOn
from .pool_growth import Frontier, Growth, Root, branch, grow_pool, numbered, sprout
from .step_model import ALL, StepModel
from .text import Pairs, PlaceWindow, Positions, Prefix


FEWEST = 2  # Minimum number of tokens, children or slots in a compiled pass: size 1 would need separate code.


Given = TypeVar("Given", "First", "LevelNodes")
Found = TypeVar("Found")


class DraftPass(ABC, Generic[Given, Found]):
    """One forward pass of a draft model. `__call__` runs it eagerly; `of_tensors` is its compilable form."""

    # For each input of `of_tensors` a string with one letter per dimension: `b` for rows, `1` and `*` for sizes that
    # never change, other letters for sizes that change from call to call.
    sizes: ClassVar[Sequence[str]]

    def __init__(self, model: StepModel) -> None:
        self.model = model

    @property
    @abstractmethod
    def name(self) -> str:
        """Say in words for users what the pass does: the name of its compiled code."""

    @abstractmethod
    def __call__(self, given: Given) -> Found:
        """Run the pass eagerly on the inputs `given`, and return its results."""

    @abstractmethod
    def tensors(self, given: Given) -> list[Tensor]:
        """Convert `given` to inputs of `of_tensors`. Pads dimensions whose size may change to 2 (`FEWEST`) or more."""

    @abstractmethod
    def of_tensors(self, cache: DraftCache, *tensors: Tensor) -> Found:
        """Run the pass on the tensors that the method `tensors` returned, with the keys and values in `cache`."""

    @abstractmethod
    def trimmed(self, found: Found, given: Given) -> Found:
        """Return `found`, results of `of_tensors`, without the nodes that `tensors` added to `given` as padding."""


class RunPass(Protocol):
    """Runs a pass on its inputs `given`, eagerly or by compiled code, and returns the pass's results."""

    def __call__(self, one: DraftPass[Given, Found], given: Given) -> Found: ...


def run_eager(one: DraftPass[Given, Found], given: Given) -> Found:
    """Run a pass eagerly, without compiled code."""
    return one(given)


def text_of_tensors(
    model: StepModel, cache: DraftCache, tensors: Sequence[Tensor], ahead: int
) -> tuple[Pairs, Prefix]:
    """Make `Pairs` and `Prefix` from tensors, for compiled code. Each row's text ends at the last of its slots.

    `tensors` are the pairs' features `[b, t, F]`, tokens, slots and positions `[b, t]`; then a bool mask
    `[b or 1, s]`, false for slots with padding of the text, arbitrary after the text. A row with fewer than t pairs
    repeats some of them, in the same slots. `ahead` is the number of positions needed after the text.
    """
    features, tokens, slots, positions, shown = tensors
    width, length, ends = tokens.shape[1], shown.shape[1], slots[:, -1:] + 1
    later = positions[:, -1:] + 1 + torch.arange(ahead, device=tokens.device)
    every, window = torch.cat([positions, later], dim=1), PlaceWindow(model)
    seen = (torch.arange(length, device=tokens.device) < ends) & shown
    pairs = Pairs(tokens, features, slots, Positions(window, every, slice(0, width)))
    return pairs, Prefix(cache, length, Positions(window, every, slice(width, width + ahead)), None, seen, ends)


def filled_up(part: Tensor) -> Tensor:
    """Pad `[b, t, ...]` to at least `FEWEST` (2) tokens by repeating the last token."""
    return part if part.shape[1] >= FEWEST else part[:, -1:].expand(-1, FEWEST, *part.shape[2:])


def read(model: StepModel, pairs: Pairs, text: Prefix, before: Root | None = None) -> Root:
    """Run all depths of the model over new `pairs`, and return the new `Root`. `before` is the previous `Root`."""
    tokens, features, where, positions = pairs
    newest, places = slice(-1, None), positions.places
    wanted = newest if model.depths == 1 else ALL
    hidden = None if features is None else model.fuse(features)
    outputs: list[Tensor] = []  # `list[Tensor]()` would break the compiled graph
    carried: list[Tensor] = []
    paired = None if hidden is None else hidden[:, newest]
    for depth in range(model.depths):
        if depth:
            assert hidden is not None
            last = before.carried[depth - 1] if before is not None else torch.zeros_like(hidden[:, :1])
            hidden = one_later(torch.cat([last, hidden], dim=1), where)
        entries = text.cache.attend(where, text.length, seen=text.seen_at(depth))
        outputs.append(model.run(depth, tokens, hidden, places, entries, wanted))
        if model.depths > 1:
            hidden = model.feedback(outputs[-1], hidden)
            assert hidden is not None
            carried.append(hidden[:, newest])
    return Root(tokens[:, -1], outputs[0][:, newest], paired, tuple(carried))


def one_later(states: Tensor, where: int | Tensor) -> Tensor:
    """Return for each of t tokens the state of the token before it, `[b, t, h]`.

    `states` `[b, 1 + t, h]` begins with the state before the first token. Rows with fewer tokens repeat some, with the
    same slot in `where`. So the token before a token is found by its slot, which is lower by 1.
    """
    if not isinstance(where, Tensor):
        return states[:, :-1]
    is_before = where[:, None, :] == where[:, :, None] - 1  # [b, t, t]
    places = torch.where(is_before.any(-1), is_before.int().argmax(-1) + 1, 0)
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


class LevelNodes(NamedTuple):
    """Inputs of a `LevelPass`, which runs over drafted nodes and drafts one more level."""

    nodes: Frontier  # n nodes, the newest level first; only the first w nodes have scores and get children
    itself: Tensor  # [b or 1, k, k] identity matrix: in their level, the k next nodes attend only to themselves
    positions: Positions  # one position for each level of the nodes, the first level first
    text: Prefix  # the text before the tree
    depth: int = 0  # number of the model's depth (see `StepModel`) that runs over the nodes
    is_last: bool = False  # whether the new level is the last one


class LevelPass(DraftPass[LevelNodes, tuple[Tensor | None, Growth]]):
    """Runs one depth of the model (see `StepModel`) over drafted nodes, and drafts children of the newest level.

    Returns two things: for each node the hidden state `[b, n, h]` to pair with its children (`None` if the new level
    is the last), and the new level.
    """

    sizes = ("bt", "bt*", "b1", "bte", "bs", "bt", "kk")
    name = "a level"

    def __call__(self, given: LevelNodes) -> tuple[Tensor | None, Growth]:
        (tokens, scores, hidden, visible), text, depth = given.nodes, given.text, given.depth
        places, width = given.positions.places, scores.shape[1]
        if depth:
            levels = torch.arange(depth - 1, -1, -1, device=tokens.device).repeat_interleave(width)
            places = tuple(part[:, levels] for part in places)
        entries = text.cache.attend(-visible.shape[2], text.length, seen=text.seen_at(depth), drafted=visible)
        output = self.model.run(depth, tokens, hidden, places, entries)
        carried = None if given.is_last else self.model.feedback(output, hidden)
        paired = None if carried is None else carried[:, :width]
        asking = output[:, :width]
        return carried, branch(self.model, given.nodes, asking, paired, given.itself, given.is_last, depth)

    def tensors(self, given: LevelNodes) -> list[Tensor]:
        (tokens, scores, hidden, visible), text = given.nodes, given.text
        assert hidden is not None
        (rows, width, entries), length = visible.shape, text.length
        count, seen = max(width, FEWEST), text.shown(length).expand(rows, length)
        if width == entries:  # equal sizes would need separate code: add entries that no node attends to
            visible = F.pad(visible, (0, count + 1 - width))
        return [
            filled_up(tokens),
            filled_up(hidden),
            given.positions.numbers.expand(rows, -1),
            filled_up(visible),
            seen if length >= FEWEST else F.pad(seen, (0, FEWEST - length)),
            scores if width == count else F.pad(scores, (0, count - width), value=-torch.inf),
            torch.eye(count, dtype=torch.bool, device=tokens.device),
        ]

    def of_tensors(self, cache: DraftCache, *tensors: Tensor) -> tuple[Tensor | None, Growth]:
        tokens, hidden, numbers, visible, seen, scores, itself = tensors
        positions = Positions(PlaceWindow(self.model), numbers, slice(0, 1))
        text = Prefix(cache, seen.shape[1], positions, None, seen)
        return self(LevelNodes(Frontier(tokens, scores, hidden, visible), itself[None], positions, text))

    def trimmed(self, found: tuple[Tensor | None, Growth], given: LevelNodes) -> tuple[Tensor | None, Growth]:
        return found if given.nodes.scores.shape[1] >= FEWEST else (found[0], _lone(found[1]))


def _lone(growth: Growth) -> Growth:
    """Remove padding from a level drafted below a single node: keep only this node's best child."""
    assert growth.frontier is not None
    tokens, scores, hidden, visible = growth.frontier
    hidden = None if hidden is None else hidden[:, :1]
    visible = torch.cat([visible[:, :1, :1], visible[:, :1, FEWEST:]], dim=-1)
    frontier = Frontier(tokens[:, :1], scores[:, :1], hidden, visible)
    best = None if growth.best is None else torch.zeros_like(growth.best[:, :1])
    return Growth(tokens[:, :1, None], scores[:, :1, None], best, frontier)


class First(NamedTuple):
    """Inputs of a `FirstPass`: the newest tokens, their text, the root before them, and the shape to draft."""

    pairs: Pairs
    text: Prefix
    before: Root | None
    shape: TreeShape


Grown = TypeVar("Grown", bound=NamedTuple)


class FirstPass(DraftPass[First, tuple[Root, Grown]]):
    """Runs the model over the newest tokens, and drafts the levels that need no further pass."""

    sizes: ClassVar[Sequence[str]] = ("bt*", "bt", "bt", "bt", "bs")

    @abstractmethod
    def edges(self, shape: TreeShape, rows: int, fewest: int = 0) -> list[Tensor]:
        """Return `edges` for `below`: tensors whose sizes, at least `fewest`, set how many nodes it drafts."""

    @abstractmethod
    def below(self, root: Root, text: Prefix, shape: TreeShape | None, *edges: Tensor) -> Grown:
        """Draft levels below `root`. In compiled code `shape` is `None`, and the sizes of `edges` replace it."""

    @abstractmethod
    def ahead(self, shape: TreeShape | None) -> int:
        """Return the number of positions after the text that `below` needs."""

    def __call__(self, given: First) -> tuple[Root, Grown]:
        root = read(self.model, given.pairs, given.text, given.before)
        return root, self.below(root, given.text, given.shape, *self.edges(given.shape, len(root.tokens)))

    def tensors(self, given: First) -> list[Tensor]:
        (tokens, features, _, positions), text = given.pairs, given.text
        assert features is not None
        rows, length = len(tokens), max(text.length, FEWEST)
        parts = [features, tokens, given.pairs.slots.expand(rows, -1), positions.numbers.expand(rows, -1)]
        shown = text.shown(length).expand(rows, length)
        return [*map(filled_up, parts), shown, *self.edges(given.shape, rows, FEWEST)]

    def of_tensors(self, cache: DraftCache, *tensors: Tensor) -> tuple[Root, Grown]:
        pairs, text = text_of_tensors(self.model, cache, tensors[:5], self.ahead(None))
        root = read(self.model, pairs, text)
        grown = self.below(root, text, None, *tensors[5:])
        return Root(root.tokens.clone(), root.output), grown  # an output must not be a view of an input

    def trimmed(self, found: tuple[Root, Grown], given: First) -> tuple[Root, Grown]:
        return found


class SproutPass(FirstPass[Growth]):
    """Runs the model over the newest tokens, and drafts only the first level."""

    sizes = (*FirstPass.sizes, "kk")
    name = "the text and the first level"

    def edges(self, shape: TreeShape, rows: int, fewest: int = 0) -> list[Tensor]:
        return [torch.eye(max(shape.top_k, fewest), dtype=torch.bool, device=self.model.device)]

    def ahead(self, shape: TreeShape | None) -> int:
        return 0

    def below(self, root: Root, text: Prefix, shape: TreeShape | None, *edges: Tensor) -> Growth:
        return sprout(self.model, root, edges[0], is_last=shape is not None and shape.depth == 1)

    def trimmed(self, found: tuple[Root, Growth], given: First) -> tuple[Root, Growth]:
        return found if given.shape.top_k >= FEWEST else (found[0], _lone(found[1]))


class Draft(ABC, Generic[Grown]):
    """Drafts pools of one shape with a model: a first pass drafts some levels, later passes draft the others."""

    model: StepModel
    shape: TreeShape  # the requested shape, reduced to the levels and children that the model can draft
    first: FirstPass[Grown]
    ahead: int  # number of positions after the text that a draft needs
    tree_room: int  # number of cache slots that a draft needs
    level_sizes: list[int]  # number of nodes in each level of the pool
    goes_on: GoesOn | None = None  # see `DraftRequest`; `None` also in drafts that cannot stop early

    @abstractmethod
    def __init__(self, model: Any, shape: TreeShape) -> None: ...

    @abstractmethod
    def pool(self, root: Root, grown: Grown, text: Prefix, run: RunPass) -> CandidatePool:
        """Run the passes after the first one, whose result is `grown`, and return the complete pool."""

    def __call__(
        self, pairs: Pairs | None, text: Prefix, before: Root | None, run: RunPass = run_eager
    ) -> tuple[Root, CandidatePool]:
        """Run the model over the new `pairs`, and draft below them; without `pairs` draft below the root `before`."""
        if pairs is not None:
            root, grown = run(self.first, First(pairs, text, before, self.shape))
        else:
            assert before is not None
            root, edges = before, self.first.edges(self.shape, len(before.tokens))
            grown = self.first.below(root, text, self.shape, *edges)
        return root, self.pool(root, grown, text, run)

    def of_tensors(self, cache: DraftCache, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Draft from the result of `tensors`, by operators that a CUDA graph can capture.

        Attention covers all slots of the cache, so no size depends on the text's length. Return the root's output
        `[b, 1, h]`, the tensors of `CandidatePool` without `levels`, and the tensors of `DraftTree`.
        """
        *pair_tensors, shown = tensors
        shown = shown.expand(-1, cache.capacity)
        pairs, text = text_of_tensors(self.model, cache, [*pair_tensors, shown], self.ahead)
        root, pool = self(pairs, text, None)
        tree = DraftTree.from_pool(root.tokens, pool, self.shape.total_tokens, self.shape.depth)
        ranked = tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores
        return root.output, pool.tokens, pool.parents, pool.scores, *ranked

    def tensors(self, pairs: Pairs, text: Prefix) -> list[Tensor]:
        """Convert new `pairs` and their text to the input tensors of `of_tensors`."""
        rows = len(pairs.tokens)
        assert pairs.features is not None
        slots, positions = (part.expand(rows, -1) for part in (pairs.slots, pairs.positions.numbers))
        return [pairs.features, pairs.tokens, slots, positions, text.shown(text.cache.capacity)]

    def found(self, outputs: Sequence[Tensor], newest: Tensor) -> tuple[Root, CandidatePool, DraftTree]:
        """Convert the outputs of `of_tensors` to the root, pool and tree below the `newest` tokens `[b]`."""
        output, pool_tokens, pool_parents, pool_scores, tokens, parents, depths, ancestors, scores = outputs
        tree = DraftTree(tokens, parents, depths, ancestors, scores, min(self.shape.depth, tokens.shape[1] - 1))
        pool = CandidatePool(pool_tokens, pool_parents, pool_scores, numbered(self.level_sizes))
        return Root(newest, output), pool, tree


class LevelDraft(Draft[Growth]):
    """Drafts level by level, with a pass for each level. If the model has several depths, each drafts one level."""

    def __init__(self, model: StepModel, shape: TreeShape, goes_on: GoesOn | None = None) -> None:
        # A node is never kept unless it is among the best `total_tokens - 1` nodes of its level.
        top_k = min(shape.top_k, max(shape.total_tokens - 1, 1), model.proposable_tokens)
        depth = min(shape.depth, model.depths) if model.depths > 1 else shape.depth
        self.model, self.shape = model, TreeShape(shape.total_tokens, depth, top_k)
        self.first, self.goes_on = SproutPass(model), goes_on
        self.ahead, self.tree_room = max(depth - 1, 1), (depth - 1) * top_k + FEWEST
        self.level_sizes = [top_k] + [top_k**2] * (depth - 1)

    def pool(self, root: Root, grown: Growth, text: Prefix, run: RunPass) -> CandidatePool:
        one = LevelPass(self.model)

        def next_level(frontier: Frontier, level: int, is_last: bool) -> Growth:
            itself, here = frontier.visible[..., : frontier.tokens.shape[1]], text.ahead.part(level - 1, level)
            return run(one, LevelNodes(frontier, itself, here, text, is_last=is_last))[1]

        deeper = next_level if self.model.depths == 1 else _Depths(one, root, text)
        return grow_pool(grown, self.shape.depth, deeper, self.goes_on)


class _Depths:
    """Drafts level m + 1 with the model's depth m, which runs over the nodes of levels 1 to m.

    A depth must run over the nodes of all these levels, since it has its own keys and values. It pairs each node with
    the hidden state that depth m - 1 returned at the node's parent.
    """

    def __init__(self, one: LevelPass, root: Root, text: Prefix) -> None:
        self._pass, self._root, self._text = one, root, text
        self._above: list[Frontier] = []  # the earlier levels, the newest first, as in the lists below
        self._origins: list[Tensor] = []  # [b, w] for each level but the first: index of each node's parent
        self._carried: list[Tensor] = []  # [b, w, h] for each level: hidden states returned by the previous depth

    def __call__(self, frontier: Frontier, level: int, is_last: bool) -> Growth:
        levels, width = [frontier, *self._above], frontier.tokens.shape[1]
        hidden = [] if frontier.hidden is None else [frontier.hidden]
        for origin, carried in zip(self._origins[1:], self._carried[1:], strict=True):
            hidden.append(carried.gather(1, origin[..., None].expand(-1, -1, carried.shape[-1])))
        if self._above:
            hidden.append(self._root.carried[level - 1].expand(-1, width, -1))
        tokens = torch.cat([one.tokens for one in levels], dim=1)
        nodes = Frontier(tokens, frontier.scores, torch.cat(hidden, dim=1), self.visible(levels))
        itself, positions = frontier.visible[..., :width], self._text.ahead.part(0, level)
        states, growth = self._pass(LevelNodes(nodes, itself, positions, self._text, level, is_last))
        if states is not None and growth.best is not None:
            self._above, self._carried = levels, list(states.split(width, dim=1))
            self._origins.insert(0, growth.best.div(width, rounding_mode="floor"))
        return growth

    @staticmethod
    def visible(levels: Sequence[Frontier]) -> Tensor:
        """Return a bool mask `[b, w * levels, w * levels]`: true where a node attends to a node (last dimension)."""
        width = levels[0].tokens.shape[1]
        return torch.cat([F.pad(one.visible, (width * later, 0)) for later, one in enumerate(levels)], dim=1)
