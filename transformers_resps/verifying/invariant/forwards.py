"""Run a target over static cache buffers so that a node's result depends only on its own text."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..slots.buffers import SlotLayer
from ..slots.forwards import SlotForward, by_planes, node_positions
from .attention import BlockLayout, BlockReads, use_invariant_attention
from .experts import use_invariant_experts


class _FiniteSlotLayer(SlotLayer):
    """A slot layer that replaces overflow in float16 by 0: a NaN would reach even nodes that do not see its slot."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if key_states.dtype is torch.float16:
            key_states, value_states = (part.nan_to_num(0.0, 0.0, 0.0) for part in (key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)


class InvariantInputs(NamedTuple):
    """The first inputs of a forward over a tree or a part of a prompt; the tensors of a `BlockLayout` follow them."""

    tokens: Tensor  # [b, n]
    depths: Tensor  # [b, n], below the root
    roots: Tensor  # [b, 1], the root's index in the text
    positions: Tensor  # [b, n, planes]
    kept: Tensor  # [k], the nodes whose logits are computed, in this order


class PartInputs(NamedTuple):
    """The inputs of a forward over the last n of t nodes of one row; earlier nodes are in the buffers already."""

    tokens: Tensor  # [1, n]
    depths: Tensor  # [1, t]
    ancestors: Tensor  # [1, t, t], see `DraftTree`
    roots: Tensor  # see `SlotInputs`
    blocks: Tensor  # only its length is used, see `BlockLayout.of_sizes`
    levels: Tensor  # only its length is used


class InvariantForward(SlotForward):
    """A forward that computes each node from its own text alone; `running` holds `lock`, so threads take turns."""

    is_invariant = True
    sizes = ("bn", "bn", "b.", "bn.", "k", "s.", "bn", "r", "bg.", "bg.", "bg.", "bg", "lbn")
    layer = _FiniteSlotLayer

    def __init__(
        self, lock: Lock, least_rows: int, target: PreTrainedModel, cache: Cache, feature_layers: list[int] | None
    ) -> None:
        super().__init__(target, cache, feature_layers)
        self._lock, self._least_rows = lock, least_rows  # experts multiply multiples of `least_rows` rows
        self.kind = f"invariant steps with experts of {least_rows} rows"

    def function(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the target over the tensors of `InvariantInputs`, of a `BlockLayout`, and the buffers."""
        ends = len(InvariantInputs._fields), len(InvariantInputs._fields) + len(BlockLayout._fields)
        inputs, layout = InvariantInputs(*tensors[: ends[0]]), BlockLayout(*tensors[slice(*ends)])
        return self._read(inputs, layout, tensors[ends[1] :], inputs.kept)

    def _read(
        self, inputs: InvariantInputs, layout: BlockLayout, buffers: tuple[Tensor, ...], kept: Tensor | None
    ) -> tuple[Tensor, ...]:
        tokens, depths, roots, positions, _ = inputs
        slots = roots + torch.arange(tokens.shape[1], device=tokens.device)
        reads = BlockReads(layout, roots + depths, self.target.dtype)
        patterns = self.patterns.items()
        masks = {name: None if pattern is None else reads.mask(pattern) for name, pattern in patterns}
        return self.run(tokens, slots, by_planes(positions), masks, buffers, kept, resps_reads=reads)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._lock, use_invariant_attention(self.target), use_invariant_experts(self.target, self._least_rows):
            yield


class PartForward(InvariantForward):
    """A forward over the last nodes of a tree; it makes their layout on the device, so that a graph captures both."""

    is_captured = True

    def function(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the target over the tensors of `PartInputs` and the buffers."""
        part, buffers = PartInputs(*tensors[: len(PartInputs._fields)]), tensors[len(PartInputs._fields) :]
        root, asking = part.roots[:, :1].long(), part.tokens.shape[1]
        sizes = asking, len(part.blocks), len(part.levels)
        layout = BlockLayout.of_sizes(root, part.depths, part.ancestors, *sizes)
        first = part.depths.shape[1] - asking
        own = part.depths[:, first:]
        positions = node_positions(part.roots[:, 1:], own)
        inputs = InvariantInputs(part.tokens, own - first, root + first, positions, part.blocks)
        return self._read(inputs, layout, buffers, None)  # all nodes have logits
