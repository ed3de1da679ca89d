"""Drafts of fixed shapes as one launch each: what a head keeps for them from call to call."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch import Tensor

from ..compilation.captured_function import CapturedFunction
from ..compilation.weight_fingerprint import WeightFingerprint
from ..head import BoundHead, HeadCache
from ..tree import CandidatePool, DraftTree, TreeShape
from .draft_function import DraftFunction


logger = logging.getLogger(f"transformers.{__name__}")


class DraftEngine:
    """Captures the drafts of one head, for each shape and capacity of its cache once.

    One call of `generate` uses it at a time. A copied or pickled model starts anew.

    Args:
        capture: makes of a function one that runs as one launch.
        can_capture: whether drafts with a head can be captured.
    """

    def __init__(
        self,
        capture: Callable[[Callable[..., Any]], CapturedFunction] = CapturedFunction,
        can_capture: Callable[[BoundHead], bool] = lambda bound: _can_capture(bound),
    ) -> None:
        self._capture, self._can_capture = capture, can_capture
        self._cache: HeadCache | None = None
        self._functions: dict[tuple[TreeShape, int, int], tuple[DraftFunction, CapturedFunction]] = {}
        self._fingerprint: WeightFingerprint | None = None
        self._is_broken = False
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["DraftEngine"], tuple[()]]:
        return DraftEngine, ()

    @contextmanager
    def borrow(self, bound: BoundHead | None) -> Iterator["DraftEngine | None"]:
        """Lend this engine; nothing without a head, where drafts cannot be captured, or while another call uses it."""
        if bound is None or not self._can_capture(bound) or not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            fingerprint = WeightFingerprint(bound.head)
            if fingerprint != self._fingerprint:
                self._fingerprint, self._cache, self._is_broken = fingerprint, None, False
                self._functions.clear()
            yield self
        finally:
            self._lock.release()

    def cache(self, bound: BoundHead, rows: int) -> HeadCache:
        """The head's cache for a batch, at the same place as in earlier calls."""
        if self._cache is None or self._cache.buffers[0].shape[1] != rows:
            self._functions.clear()
            self._cache = HeadCache.empty(bound.head.config, rows, bound.head.dtype, bound.head.device)
        return self._cache

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
        if self._is_broken:
            return None
        key = shape, inputs[1].shape[1], cache.tree_room
        if key not in self._functions:
            made = DraftFunction(bound, shape, cache.tree_room)
            self._functions[key] = made, self._capture(made)
        function, captured = self._functions[key]
        try:
            outputs: tuple[Tensor, ...] = captured(inputs, cache.buffers)
        except (RuntimeError, NotImplementedError) as fault:
            self._is_broken = True
            self._functions.clear()
            logger.warning(f"Drafts run without a CUDA graph: {type(fault).__name__}, {str(fault).splitlines()[:1]}.")
            return None
        return outputs[0], *function.unpack(outputs)


def _can_capture(bound: BoundHead) -> bool:
    """Whether its drafts are a function of tensors on a GPU: some ropes look at the largest position."""
    return bound.head.device.type == "cuda" and bound.head.config.has_fixed_rope
