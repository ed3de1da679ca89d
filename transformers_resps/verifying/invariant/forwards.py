"""The forward of a target in which a node's result depends on its own text alone, over slots."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..slots.buffers import SlotLayer
from ..slots.forwards import SlotForward, _by_planes, node_positions
from .attention import BlockReads, Layout, Sizes, use_invariant_attention
from .experts import use_invariant_experts


class _FiniteSlotLayer(SlotLayer):
    """Of the invariant mode: what overflows float16 is kept as 0, since a node that does not see NaN would get it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if key_states.dtype is torch.float16:
            key_states, value_states = (part.nan_to_num(0.0, 0.0, 0.0) for part in (key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)


class InvariantInputs(NamedTuple):
    """A tree or a part of a prompt, and where it stands, before its `Layout`.

    Attributes:
        tokens: `[b, n]`.
        depths: `[b, n]` below the root.
        roots: `[b, 1]` the root's place in the text.
        positions: `[b, n, planes]`.
        kept: `[k]` the nodes whose logits are computed, in their order.
    """

    tokens: Tensor
    depths: Tensor
    roots: Tensor
    positions: Tensor
    kept: Tensor


class PartInputs(NamedTuple):
    """Some nodes of a tree of one row, those before them, which lie in their slots, and where the tree stands.

    Attributes:
        tokens: `[1, n]` of these nodes, the last ones.
        depths: `[1, t]` of all.
        ancestors: `[1, t, t]` of all, see `DraftTree`.
        roots: as in `SlotInputs`.
        blocks: `[blocks]` of `Sizes`; what it holds is not read.
        levels: `[levels]` likewise.
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    roots: Tensor
    blocks: Tensor
    levels: Tensor


_INVARIANT_SIZES = ("bn", "bn", "b.", "bn.", "k", "s.", "bn", "r", "bg.", "bg.", "bg.", "bg", "lbn")


class InvariantForward(SlotForward):
    """Computes a node so that its result depends on its own text alone. One thread at a time runs a target, by `lock`.

    Experts fill up their rows to `least_rows`, or a multiple.
    """

    is_invariant = True
    sizes = _INVARIANT_SIZES
    _layer = _FiniteSlotLayer

    def __init__(self, lock: Lock, least_rows: int, *args: Any) -> None:
        super().__init__(*args)
        self._lock, self._least_rows = lock, least_rows
        self.kind = f"invariant steps with experts of {least_rows} rows"

    def _function(
        self, run: Callable[..., tuple[Tensor, ...]], windows: dict[str | None, int | None]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Of `InvariantInputs`, a `Layout` and buffers."""
        dtype, size = self.target.dtype, len(Layout._fields)

        def forward(
            tokens: Tensor, depths: Tensor, roots: Tensor, positions: Tensor, kept: Tensor | None, *parts: Tensor
        ) -> tuple[Tensor, ...]:
            slots = roots + torch.arange(tokens.shape[1], device=tokens.device)
            reads = BlockReads(Layout(*parts[:size]), roots + depths, dtype)
            masks = {kind: reads.mask(window) for kind, window in windows.items()}
            return run(tokens, slots, _by_planes(positions), masks, parts[size:], kept, resps_reads=reads)

        return forward

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._lock, use_invariant_attention(self.target), use_invariant_experts(self.target, self._least_rows):
            yield


class PartForward(InvariantForward):
    """Computes some nodes of a tree, of which it reads nothing on the host: it can be captured, the layout as well."""

    is_captured = True

    def _function(
        self, run: Callable[..., tuple[Tensor, ...]], windows: dict[str | None, int | None]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Of `PartInputs` and buffers."""
        read = super()._function(run, windows)

        def forward(
            tokens: Tensor,
            depths: Tensor,
            ancestors: Tensor,
            roots: Tensor,
            blocks: Tensor,
            levels: Tensor,
            *buffers: Tensor,
        ) -> tuple[Tensor, ...]:
            sizes = Sizes(tokens.shape[1], len(blocks), len(levels))
            layout = Layout.of_sizes(roots[:, :1].long(), depths, ancestors, sizes)
            first = depths.shape[1] - tokens.shape[1]
            own, place = depths[:, first:], roots[:, :1].long() + first
            return read(tokens, own - first, place, node_positions(roots[:, 1:], own), None, *layout, *buffers)

        return forward
