"""What a head keeps from call to call: drafts of fixed shapes as one launch each, or compiled levels."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch import Tensor

from ..compilation.captured_function import CapturedFunction
from ..compilation.faults import FAULTS, described
from ..compilation.kept_tensors import is_of_this_mode
from ..compilation.weight_fingerprint import WeightFingerprint
from ..head import BoundHead, HeadCache
from ..tree import CandidatePool, DraftTree, TreeShape
from .draft_function import DraftFunction
from .level_engine import LevelEngine
from .level_forward import LevelForward
from .pool_growth import RunLevel


logger = logging.getLogger(f"transformers.{__name__}")


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
