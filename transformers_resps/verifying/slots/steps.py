"""Run a target over trees with static cache buffers, with or without compiled code and recurrent layers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ...compilation.few_bits import has_few_bits
from ...tree import DraftTree, Pricing
from ..forward import Features, TargetForward
from ..hybrids import StateKinds, is_recurrent
from .engine import FEW_BITS_LEAST_ROWS, LEAST_ROWS, SlotEngine, padded_count
from .forwards import HybridForward, SlotForward, packs_rows
from .texts import SlotTexts, filled_up


class RowStates:
    """The states of all recurrent layers, for each row of the static cache buffers."""

    def __init__(self, kinds: StateKinds, cache: Cache) -> None:
        self.kinds = kinds
        self.tensors: Sequence[Tensor] = kinds.stacked(cache)
        self.noted: tuple[Tensor, ...] = ()  # values of the newest tree from which `advance` updates the states

    def advance(self, path: Tensor) -> None:
        """Advance the states along the accepted path `[rows, m]` of the newest tree."""
        self.kinds.advance(self.kinds.by_layer(self.tensors), self.noted, path)

    def keep_rows(self, rows: list[int]) -> None:
        kept = torch.tensor(rows, device=self.tensors[0].device)
        self.tensors = [part.index_select(1, kept) for part in self.tensors]


class VerifyingSteps(ABC):
    """Runs a target over trees with static buffers."""

    pricing: Pricing = Pricing()  # see `Verifier.pricing`
    states: RowStates | None = None  # `None` before `begin`, and without recurrent layers

    @abstractmethod
    def begin(self, cache: Cache) -> None:
        """Prepare for the first tree. `cache` holds the prompt's entries, unless the buffers already hold them."""

    @abstractmethod
    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """Run the target over a tree like `Verifier.verify`; results may end with padding rows and padding nodes."""


class SlotSteps(VerifyingSteps):
    """Runs a target over trees in the normal mode, compiled if there is an `engine`.

    `options` are for `torch.compile`. With `follows_parts`, the same compiled code has already read the prompt in
    parts, so the first step compiles nothing.
    """

    _over_slots: SlotForward

    def __init__(
        self,
        forward: TargetForward,
        texts: SlotTexts,
        engine: SlotEngine | None,
        options: dict[str, Any] | None = None,
        follows_parts: bool = False,
    ) -> None:
        self._forward, self._texts, self._engine, self._options = forward, texts, engine, options
        self._follows_parts = follows_parts
        self._least_rows = FEW_BITS_LEAST_ROWS if has_few_bits(forward.target) else LEAST_ROWS

    def begin(self, cache: Cache) -> None:
        self._forward.stop_catching()  # code that is compiled with hooks would always run them
        target = self._forward.target
        # A captured graph keeps its outputs in memory, so it returns only the layers that are read.
        layers = None if self._texts.rows.device.type == "cpu" else self._forward.layers
        given = target, self._texts.pattern, layers, self._options
        if is_recurrent(target):
            self._over_slots = hybrid = HybridForward(*given)
            self.states = RowStates(hybrid.states, cache)
            return
        is_packed = packs_rows(target, is_batch=len(self._texts.rows) > 1)
        self._over_slots = SlotForward(*given, packs_rows=is_packed)
        self.pricing = Pricing(packs_rows=is_packed)

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        logits, features = self.run(self._inputs(tree))
        return _unpacked(logits[0], tree) if self.pricing.packs_rows else logits, features

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Features]:
        """Run the target over the fields of a `SlotInputs`; return logits and features, of packed rows if they are."""
        states = () if self.states is None else self.states.tensors
        given, buffers = [*inputs, *states], self._texts.buffers.parts()
        if self._engine is None:
            outputs = self._over_slots(given, buffers)
        else:
            outputs = self._engine.forward(self._over_slots, given, buffers)
        if self.states is not None:
            self.states.noted = self._over_slots.noted(outputs)
        layers = self._forward.layers
        return outputs[0], Features(layers, self._over_slots.features(outputs, inputs, layers))

    def _inputs(self, tree: DraftTree) -> list[Tensor]:
        """Make a forward's inputs from `tree`, padded to the buffers' number of rows and to one of few node counts."""
        texts, device = self._texts, self._texts.rows.device
        least = self._least_rows
        beside = least if self.pricing.packs_rows else texts.count
        count = self._apart(padded_count(device, tree.node_count, beside, least))
        nodes, seen = texts.nodes(tree, count), texts.visible(texts.reserve(max(texts.places) + count))
        if not self.pricing.packs_rows:
            least = self._apart(padded_count(device, 1, texts.count, least))
            self.pricing = self.pricing._replace(least_nodes=least)
            return [*nodes, seen, texts.first(count)]
        packed = [row * count + node for row, own in enumerate(tree.row_sizes) for node in range(own)]
        self.pricing = self.pricing._replace(least_nodes=1 + max(least - len(tree.tokens), 0))
        packed = filled_up(packed, self._apart(max(len(packed), least), count))
        return [*nodes, seen, texts.first(len(packed)), torch.tensor(packed)]

    def _apart(self, count: int, *others: int) -> int:
        """Return `count`; if code may be compiled now, the next number unequal to `others` and to the row count."""
        return count if self._follows_parts else apart(count, self._texts.count, *others)


class RoundedSteps:
    """Runs a target with weights rounded to 4 bits, compiled by `engine`, to draft a chain of tokens.

    The tokens' keys and values are written to slots that the next tree overwrites.
    """

    def __init__(self, forward: TargetForward, texts: SlotTexts, engine: SlotEngine) -> None:
        self._target, self._texts, self._engine, self._compile_seconds = forward.target, texts, engine, 0.0

    @cached_property
    def _over_slots(self) -> SlotForward:  # made only for calls that draft so
        return SlotForward(self._target, self._texts.pattern, [], bits=4)

    def logits(self, tokens: Tensor, level: int) -> Tensor:
        """Return fp32 logits `[b, v]` after `tokens` `[b]` at `level` of a chain (root: 0). Call it level by level."""
        texts, rows = self._texts, len(tokens)
        count = apart(padded_count(texts.rows.device, 1, texts.count, FEW_BITS_LEAST_ROWS), texts.count)
        ids, depths, ancestors, roots = texts.nodes(DraftTree.root_only(tokens), count)
        seen = texts.visible(texts.reserve(max(texts.places) + level + count))
        given = [ids, depths, ancestors, roots + level, seen, texts.first(count)]
        logits, *_ = self._engine.forward(self._over_slots, given, texts.buffers.parts())
        self._compile_seconds += self._engine.take_compile_seconds()
        return logits[:rows, 0].float()

    def take_compile_seconds(self) -> float:
        seconds, self._compile_seconds = self._compile_seconds, 0.0
        return seconds


def apart(count: int, *others: int) -> int:
    """Return the least number >= `count` that is not in `others`; the compiler assumes that equal sizes stay equal."""
    return next(number for number in range(count, count + len(others) + 1) if number not in others)


def _unpacked(logits: Tensor, tree: DraftTree) -> Tensor:
    """Unpack logits `[r or more, v]` of real nodes, row by row, to `[b, n, v]`; padding nodes get arbitrary values."""
    rows, count = tree.tokens.shape
    if not tree.sizes:
        return logits[: rows * count].view(rows, count, -1)
    ends = list(accumulate(tree.sizes))
    places = [
        min(end - size + node, end - 1) for end, size in zip(ends, tree.sizes, strict=True) for node in range(count)
    ]
    return logits.index_select(0, torch.tensor(places)).view(rows, count, -1)
