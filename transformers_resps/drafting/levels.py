"""Runs the head over the levels of a tree, one after the other, below one text.

Levels of drafts by compiled code, which one head keeps from call to call.

Drafting as one function of tensors: it can be compiled as a whole, or captured as one graph.

What a head keeps from call to call: drafts of fixed shapes as one launch each, or compiled levels.

What a model keeps for the heads that it drafts with.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compilation.captured import CapturedFunction
from ..compilation.compiled import (
    FAULTS,
    CompiledFunction,
    WeightFingerprint,
    described,
    disagreement,
    is_of_this_mode,
)
from ..heads import BoundHead, DraftHead, HeadCache, Rope
from ..tree import CandidatePool, DraftTree, TreeShape
from .pool_growth import Frontier, Growth, RunLevel, branch, grow_pool


class LevelForward:
    """One pass of the head over each level: all its nodes share a position and see only the text and their ancestors.

    What the levels have in common is computed once, before them.

    Args:
        bound: the head, with its target's embedding and output rows.
        cache: holds the text's entries, and room for those of the tree.
        rope: the angles of the levels' positions, `[b or 1, depth - 1]`.
        length: slots of the text.
        text: `[b or 1, length]` bool, true where a slot is seen; `None` where all are.
    """

    def __init__(self, bound: BoundHead, cache: HeadCache, rope: Rope, length: int, text: Tensor | None) -> None:
        self.bound, self.cache, self._rope, self._length, self._text = bound, cache, rope, length, text
        self._sharing = bound.head.config.num_attention_heads // bound.head.config.num_key_value_heads

    def __call__(self, frontier: Frontier, level: int, is_last: bool) -> Growth:
        """The children of the nodes of `level` that get some; see `branch`."""
        entries = frontier.visible.shape[-1]
        rope = self._rope.at(slice(level - 1, level))
        attend = self.cache.attend_from(-entries, self._mask(frontier), end=self._length)
        output = self.bound.run_layers(frontier.hidden, self.bound.embed(frontier.tokens), rope, attend)
        return branch(self.bound, frontier, output, is_last)

    def tensors(self, frontier: Frontier, level: int) -> tuple[list[Tensor], Sequence[Tensor]]:
        """All that a level depends on: the inputs of `level_function`, each laid out row by row, and its buffers."""
        tokens, scores, hidden, visible = frontier
        text = self._seen(frontier)
        # Sizes of one, and as many entries as nodes, would be compiled apart: an entry is added that no node sees.
        if level == 1:
            visible = F.pad(visible, (0, 1))
        if text.shape[1] == 1:
            text = F.pad(text, (0, 1))
        shared = *self._rope.at(slice(level - 1, level)), text[:, None]
        inputs = [tokens, scores, hidden, visible, *(part.expand(len(tokens), -1, -1) for part in shared)]
        return [part.clone(memory_format=torch.contiguous_format) for part in inputs], self.cache.buffers

    def _mask(self, frontier: Frontier) -> Tensor | None:
        """`[b, heads that share keys, w, e + w + length]`: one copy for all of these heads."""
        rows, width, _ = frontier.visible.shape
        if self._text is None and width == 1:
            return None
        shape = (rows, self._sharing, width, -1)
        parts = frontier.visible[:, None], self._seen(frontier)[:, None, None]
        return torch.cat([part.expand(shape) for part in parts], dim=-1)

    def _seen(self, frontier: Frontier) -> Tensor:
        """`[b or 1, length]` bool, true where a slot is seen."""
        if self._text is None:
            self._text = frontier.visible.new_ones(1, self._length)
        return self._text


def level_function(bound: BoundHead, tree_room: int) -> Callable[..., Growth]:
    """A level as a function of tensors, for trees and texts of all sizes.

    Args:
        bound: the head, with its target's embedding and output rows.
        tree_room: of the cache whose buffers are passed.
    """

    def level(
        tokens: Tensor,
        scores: Tensor,
        hidden: Tensor,
        visible: Tensor,
        cosine: Tensor,
        sine: Tensor,
        text: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Growth:
        cache, text = HeadCache(keys, values, tree_room), text[:, 0]
        forward = LevelForward(bound, cache, Rope(cosine, sine), text.shape[1], text)
        return forward(Frontier(tokens, scores, hidden, visible), 1, False)

    return level


logger = logging.getLogger(f"transformers.{__name__}")

# The dimensions of the inputs of `level_function` and of the buffers that change, with several rows.
_SIZES = ((0, 1), (0, 1), (0, 1), (0, 1, 2), (0,), (0,), (0, 2))
_BUFFER_SIZES = (1, 3)


class LevelEngine:
    """Compiles a level of one head, once for trees and texts of all sizes; a chain and a batch are compiled apart.

    Args:
        clock: seconds.

    Attributes:
        compile_seconds: not taken yet.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._functions: dict[tuple[int, bool], CompiledFunction] = {}
        self._is_broken = False
        self.compile_seconds = 0.0

    def over(self, forward: LevelForward, in_batch: bool) -> RunLevel:
        """The levels of one draft, compiled; as they are where that fails.

        Args:
            forward: these levels as they are.
            in_batch: whether the call began with several rows. One that is left alone is not worth a compilation.
        """

        def run(frontier: Frontier, level: int, is_last: bool) -> Growth:
            is_batch = len(frontier.tokens) > 1
            try:
                if not self._is_broken:
                    function = self._function(forward, is_batch)
                    inputs, buffers = forward.tensors(frontier, level)
                    if is_batch == in_batch and not function.is_ready(inputs, buffers):
                        self._compile(function, forward, *_example(inputs, buffers))
                    if not self._is_broken and function.is_ready(inputs, buffers):
                        growth: Growth = function(inputs, buffers)
                        return growth
            except FAULTS as fault:
                self._give_up(described(fault))
            return forward(frontier, level, is_last)

        return run

    def _function(self, forward: LevelForward, is_batch: bool) -> CompiledFunction:
        key = forward.cache.tree_room, is_batch
        if key not in self._functions:
            dynamic = [sizes if is_batch else sizes[1:] for sizes in (*_SIZES, _BUFFER_SIZES)]
            function = level_function(forward.bound, forward.cache.tree_room)
            self._functions[key] = CompiledFunction(function, dynamic[:-1], dynamic[-1])
        return self._functions[key]

    def _compile(
        self, function: CompiledFunction, forward: LevelForward, inputs: list[Tensor], buffers: list[Tensor]
    ) -> None:
        """Compile, and give up if compiled code does not give what the eager code gives."""
        logger.warning("Compiling a level of the draft head, once. A small head takes up to a minute on two cores.")
        started = self._clock()
        try:
            expected = level_function(forward.bound, forward.cache.tree_room)(*inputs, *buffers)
            found: Growth = function(inputs, buffers)
        finally:
            self.compile_seconds += self._clock() - started
        difference = disagreement(found.scores, expected.scores, buffers[0].dtype)
        if difference is not None:
            self._give_up(f"its log probabilities {difference}")

    def _give_up(self, reason: str) -> None:
        self._is_broken = True
        self._functions.clear()
        logger.warning(f"The draft head runs as it is, not compiled: {reason}.")


def _example(inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and buffers whose sizes all differ: compiled code would take equal ones to be equal for ever."""
    tokens, _, hidden, visible, cosine, sine, text = (part[:1, :1] for part in inputs)
    rows, width, entries, length = min(len(inputs[0]), 2), min(inputs[0].shape[1], 3), 7, 11
    made = [
        tokens.expand(rows, width),
        hidden.new_zeros(rows, width, dtype=inputs[1].dtype),
        hidden.expand(rows, width, -1),
        visible.new_ones(rows, width, entries),
        *(part.expand(rows, -1, -1) for part in (cosine, sine)),
        text.new_ones(rows, 1, length),
    ]
    return [part.clone(memory_format=torch.contiguous_format) for part in made], [
        part[:, :rows].clone(memory_format=torch.contiguous_format) for part in buffers
    ]


class DraftFunction:
    """Reads the newest pairs, grows a pool and builds its tree, without a decision on values in between.

    Every size is fixed by the shape, the number of pairs and the capacity of the head's cache; the text's length is a
    value. It gives what `TreeCandidateGenerator.draft` and `DraftTree.from_pool` give.

    Args:
        bound: the head, with its target's embedding and output rows.
        shape: levels, children and nodes.
        tree_room: of the head's cache, at least `(shape.depth - 1) * shape.top_k`.
    """

    def __init__(self, bound: BoundHead, shape: TreeShape, tree_room: int) -> None:
        self._bound, self._shape, self._tree_room = bound, shape, tree_room

    def __call__(
        self, features: Tensor, tokens: Tensor, slots: Tensor, shown: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, ...]:
        """Draft below the last of the tokens.

        Args:
            features: `[b, m, F]` of the newest m pairs, the newest last. A row that has fewer begins with any values.
            tokens: `[b, m]` of the pairs.
            slots: `[b, m]` where the pairs go, ascending. A pair that is none goes to the cache's last slot, which no
                text may reach.
            shown: `[b or 1, capacity or 1]` bool, false where a slot of the text is padding.
            keys: of the cache, written in place.
            values: likewise.

        Returns:
            The head's output `[b, 1, h]` at the newest pair, the tensors of `CandidatePool` without its levels, then
            those of `DraftTree`; see `unpack`.
        """
        head, cache, width = self._bound.head, HeadCache(keys, values, self._tree_room), tokens.shape[1]
        capacity, ends = cache.capacity, slots[:, -1:] + 1
        order = torch.arange(capacity, device=slots.device)
        ahead = torch.arange(max(self._shape.depth - 1, 1), device=slots.device)
        rope = head.rope(torch.cat([slots, ends + ahead], dim=1))
        queries = 1 if head.config.num_hidden_layers == 1 else width
        mask = (order <= slots[:, -queries:, None]) & shown[:, None]
        newest = self._bound.run_layers(
            self._bound.fuse(features),
            self._bound.embed(tokens),
            rope.at(slice(width)),
            cache.attend_at(slots, capacity, mask[:, None]),
            wanted=slice(-1, None),
        )
        text = (order < ends) & shown
        levels = LevelForward(self._bound, cache, rope.at(slice(width, None)), capacity, text)
        pool = grow_pool(self._bound, newest, self._shape.top_k, self._shape.depth, levels)
        tree = DraftTree.from_pool(tokens[:, -1], pool, self._shape.total_tokens, self._shape.depth)
        ranked = tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores
        return newest, pool.tokens, pool.parents, pool.scores, *ranked

    def unpack(self, outputs: tuple[Tensor, ...]) -> tuple[CandidatePool, DraftTree]:
        """The pool and the tree that `outputs` hold."""
        width, depth = min(self._shape.top_k, self._bound.head.config.proposable_tokens), self._shape.depth
        levels = torch.arange(1, depth + 1).repeat_interleave(torch.tensor([width] + [width**2] * (depth - 1)))
        _, pool_tokens, pool_parents, pool_scores, tokens, parents, depths, ancestors, scores = outputs
        tree = DraftTree(tokens, parents, depths, ancestors, scores, min(depth, tokens.shape[1] - 1))
        return CandidatePool(pool_tokens, pool_parents, pool_scores, levels), tree


class DraftEngine:
    """Captures the drafts of one head, for each shape and capacity of its cache once; on a CPU it compiles levels.

    One call of `generate` uses it at a time. A copied or pickled model starts anew.

    Args:
        capture: makes of a function one that runs as one launch.
        captures: whether drafts with a head are captured; otherwise levels are compiled.
        clock: seconds.
    """

    def __init__(
        self,
        capture: Callable[[Callable[..., Any]], CapturedFunction] = CapturedFunction,
        captures: Callable[[BoundHead], bool] = lambda bound: bound.head.device.type == "cuda",
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._capture, self._captures, self._clock = capture, captures, clock
        self._rows = 0
        self._cache: HeadCache | None = None
        self._functions: dict[tuple[TreeShape, int, int], tuple[DraftFunction, CapturedFunction]] = {}
        self._levels = LevelEngine(clock)
        self._fingerprint: WeightFingerprint | None = None
        self._is_broken = False
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["DraftEngine"], tuple[()]]:
        return DraftEngine, ()

    @contextmanager
    def borrow(self, bound: BoundHead) -> Iterator["DraftEngine | None"]:
        """Lend this engine; nothing where angles depend on the text's length, or while it is lent."""
        if not bound.head.config.has_fixed_rope or not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            fingerprint = WeightFingerprint(bound.modules, bound.head.training)
            if fingerprint != self._fingerprint:
                self._fingerprint, self._cache, self._is_broken = fingerprint, None, False
                self._functions.clear()
                self._levels = LevelEngine(self._clock)
            yield self
        finally:
            self._lock.release()

    def cache(self, bound: BoundHead, rows: int) -> HeadCache:
        """The head's cache for a batch, at the same place as in earlier calls."""
        self._rows = rows
        if self._cache is None or self._cache.rows != rows or not is_of_this_mode(self._cache.buffers[0]):
            self._functions.clear()
            self._cache = HeadCache.empty(bound.head.config, rows, bound.head.dtype, bound.head.device)
        return self._cache

    def levels(self, forward: LevelForward) -> RunLevel:
        """The levels of one draft, compiled where drafts are not captured."""
        return forward if self._captures(forward.bound) else self._levels.over(forward, self._rows > 1)

    def take_compile_seconds(self) -> float:
        """Seconds of compiling since they were last taken."""
        seconds, self._levels.compile_seconds = self._levels.compile_seconds, 0.0
        return seconds

    def captures(self, bound: BoundHead) -> bool:
        """Whether whole drafts are captured."""
        return self._captures(bound) and not self._is_broken

    def draft(
        self, bound: BoundHead, shape: TreeShape, cache: HeadCache, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, CandidatePool, DraftTree] | None:
        """Draft with one launch, or capture first.

        Args:
            bound: the head, with its target's embedding and output rows.
            shape: levels, children and nodes.
            cache: of this engine.
            inputs: see `DraftFunction`: features, tokens, slots and what is shown.

        Returns:
            The head's output at the newest pair, the pool and the tree, until the next draft; `None` where capturing
            fails.
        """
        key = shape, inputs[1].shape[1], cache.tree_room
        if key not in self._functions:
            made = DraftFunction(bound, shape, cache.tree_room)
            self._functions[key] = made, self._capture(made)
        function, captured = self._functions[key]
        try:
            outputs: tuple[Tensor, ...] = captured(inputs, cache.buffers)
        except FAULTS as fault:
            self._is_broken = True
            self._functions.clear()
            logger.warning(f"Drafts run without a CUDA graph: {described(fault)}.")
            return None
        return outputs[0], *function.unpack(outputs)


_HEADS = 4  # each engine holds its head's weights once more


class DraftEngines:
    """An engine for each of the last heads: whoever drafts with several in turn compiles each of them once.

    A copied or pickled model starts anew.

    Args:
        make: makes the engine of one head.
    """

    def __init__(self, make: Callable[[], DraftEngine] = DraftEngine) -> None:
        self._make = make
        self._engines: dict[DraftHead, DraftEngine] = {}  # the one that was used last comes last
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["DraftEngines"], tuple[()]]:
        return DraftEngines, ()

    def borrow(self, bound: BoundHead | None) -> AbstractContextManager[DraftEngine | None]:
        """Lend the engine of a head; see `DraftEngine.borrow`. Nothing without a head."""
        if bound is None:
            return nullcontext()
        with self._lock:
            engine = self._engines.pop(bound.head, None) or self._make()
            self._engines[bound.head] = engine
            for head in list(self._engines)[:-_HEADS]:
                del self._engines[head]
        return engine.borrow(bound)
