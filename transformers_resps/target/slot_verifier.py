"""The target's side of decoding one batch over slots: nothing moves, and the forward sees few sizes."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from ..tree import DraftTree, moved
from .features import Features
from .forward import TargetForward
from .slot_cache import filled_layers, give_back
from .slot_engine import SlotEngine
from .slot_forward import SlotForward, SlotInputs, SlotLayout
from .slot_table import SlotTable
from .tree_verifier import TreeVerifier


Row = TypeVar("Row")

_WINDOW = 128  # slots: the forward sees multiples of it


class SlotTreeVerifier(TreeVerifier):
    """A `TreeVerifier` whose steps run over the slots of an engine. The prompt is read as ever.

    Args:
        forward: the target's, over a dynamic cache.
        engine: lent to this call.
        feature_layers: the hidden states that a head reads, below the last.
        position_ids: as `TreeVerifier`.
        attention_mask: as `TreeVerifier`.
        options: of `torch.compile`, where the caller has some.
    """

    def __init__(
        self,
        forward: TargetForward,
        engine: SlotEngine,
        feature_layers: list[int],
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(forward, position_ids, attention_mask)
        self._engine, self._target, self.is_compiled = engine, forward.target, engine.compiles
        self._feature_layers, self._options = feature_layers, options
        self._rows = 0  # of the buffers: those that are decoded, and copies of the last
        self._ready: tuple[DraftTree, SlotInputs, list[Tensor]] | None = None  # for the coming forward

    def _begin_steps(self) -> None:
        """Move the prompt's entries into the buffers."""
        self._forward.stop_catching()  # code that is compiled with hooks would run them for ever
        rows, length = len(self._root_positions), self.length
        layout = SlotLayout(self._target.config, self._cache)
        self._forward_over_slots = SlotForward(self._target, layout, self._feature_layers, self._options)
        visible = self._slots.visible(length, torch.device("cpu"))
        self._table = SlotTable([[True] * length] * rows if visible is None else visible.tolist())
        self._rows = rows
        self._engine.buffers.fill(filled_layers(self._cache), length, rows, _windowed(length + _WINDOW))

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """As `TreeVerifier.verify`."""
        rows, count = tree.tokens.shape
        padded = self._engine.run(self._forward_over_slots, *self._prepared(tree))
        outputs = [part[:rows, :count] for part in padded]
        features = Features(self._feature_layers)
        features.caught = dict(zip(self._feature_layers, outputs[1:], strict=True))
        return outputs[0], features

    def must_compile(self, tree: DraftTree) -> bool:
        """Whether the coming forward, the first of its kind, takes longer than all that follow."""
        return self._engine.must_compile(self._forward_over_slots, *self._prepared(tree))

    def undo(self) -> None:
        """Forget the newest tree: its slots are still free."""

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        """As `TreeVerifier.keep`."""
        counts = list(map(len, paths))
        self._slots.extend(counts)
        self._table.keep(_filled_up(paths, self._rows))
        self._ready = None

    def keep_rows(self, rows: list[int]) -> None:
        """Decode these rows only, from now on.

        Of a batch two are kept on a CPU, since one row alone is compiled apart; elsewhere all are, for their graphs.
        """
        self._slots.keep_rows(rows)
        self._shift_by([self._shifts[row] for row in rows])
        kept = _filled_up(rows, min(self._rows, 2) if self.device.type == "cpu" else self._rows)
        self._rows = len(kept)
        self._table.keep_rows(kept)
        self._engine.buffers.keep_rows(kept)
        self._ready = None

    def close(self) -> None:
        """Give the cache what was kept, in the order of the text; rows that differ in length have no further use."""
        if self._rows and len(set(self._table.lengths)) == 1:
            give_back(self._engine.buffers.entries(self._table.rows), self._cache, self.length)
        super().close()

    def _prepared(self, tree: DraftTree) -> tuple[SlotInputs, list[Tensor]]:
        """The inputs of a forward over `tree`, padded to rows and nodes, and the buffers that it sees."""
        if self._ready is None or self._ready[0] is not tree:
            self._ready = (tree, *self._prepare(tree))
        return self._ready[1:]

    def _prepare(self, tree: DraftTree) -> tuple[SlotInputs, list[Tensor]]:
        count = self._engine.node_count(self.device, tree.node_count)
        count += count == self._rows  # equal sizes at the first call would be taken for equal for ever
        slots, buffers = self._table.offer(count), self._engine.buffers
        size = _windowed(self._table.size)
        if size > buffers.size:
            buffers.grow(2 * size)
        roots = zip(self._table.lengths, _filled_up(self._root_positions, self._rows), strict=True)
        host = [torch.tensor(slots), self._table.places(size), torch.tensor(list(roots))]
        if self.device.type != "cpu":
            host = moved(host, self.device)
        padded = tree.padded(count)
        nodes = [_with_rows(part, self._rows) for part in (padded.tokens, padded.depths, padded.ancestors)]
        return SlotInputs(*nodes, *host), buffers.window(size)


def _filled_up(rows: list[Row], count: int) -> list[Row]:
    """At least `count` rows, the last one repeated."""
    return rows + rows[-1:] * (count - len(rows))


def _with_rows(part: Tensor, count: int) -> Tensor:
    """`[b, ...]` -> `[count, ...]`, the last row repeated."""
    missing = count - len(part)
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part


def _windowed(count: int) -> int:
    return -(-count // _WINDOW) * _WINDOW
