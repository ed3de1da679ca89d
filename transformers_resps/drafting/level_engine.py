"""Levels of drafts by compiled code, which one head keeps from call to call."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compilation.agreement import disagreement
from ..compilation.compiled_function import CompiledFunction
from ..compilation.faults import FAULTS, described
from .level_forward import LevelForward, level_function
from .pool_growth import Frontier, Growth, RunLevel


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
