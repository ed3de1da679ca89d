"""The target's side of decoding one batch: read the prompt, then verify a tree and keep its accepted path, and again.

Over a cache that grows, or over slots.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from math import gcd
from typing import Any, NoReturn, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from ..tree import DraftTree, Pricing, moved
from .attention import last_position, longrope_boundary, tree_attention_mask, tree_positions
from .cache import (
    cached_length,
    check_cache,
    compact,
    compact_ragged,
    copied_row,
    crop,
    crop_to,
    has_windows,
    keep_rows,
    preallocate,
    record_windows,
    restore_stock_layers,
    visible_entries,
    window_of,
)
from .forward import Features, TargetForward
from .hybrids import RecurrentMixers
from .invariant import BLOCK, Layout, levels_below
from .prepacking import is_prepacked
from .returned import EndedRow, UnreadDynamicCache
from .row_classes import RowNeeds, kernel_settings
from .rows import SlotMap
from .slots import (
    LEAST_ROWS,
    HybridForward,
    InvariantForward,
    InvariantInputs,
    PackedForward,
    PackedInputs,
    PartForward,
    PartInputs,
    SlotBuffers,
    SlotEngine,
    SlotForward,
    SlotInputs,
    filled,
    forward_over_slots,
    give_back,
    node_positions,
    padded_count,
)


Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class TargetEntries:
    """What the target keeps of the rows between two steps, without rejected tokens, for a drafter that attends to it.

    Valid until the next forward. Of each kind of layers, as the config names them, or "full_attention" where it names
    none, the last layer that has entries of its own.

    Attributes:
        states: kind -> keys and values, `[b, kv heads, s, hd]` each.
        masks: kind -> `[b, 1, 1, s]`, 0 where the coming root may look, else the dtype's minimum. It has no entry yet.
        positions: `[b or 1, 1]` of the coming roots, or `[planes, b or 1, 1]`.
    """

    states: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]
    positions: Tensor


class Verifier(ABC):
    """Owns the target's cache while a batch is decoded, and knows where every row ends.

    Use it in `with`: at the end, even after an interruption, the cache is a stock one and holds only what was kept.

    Args:
        forward: the target's, over the cache to decode with.
        position_ids: `[b or 1, s]` of the prompt, or `[planes, b or 1, s]` where a token has several positions; s
            counts what the cache already holds.
        attention_mask: `[b, s]` of the prompt, or `None` when nothing is padded.

    Attributes:
        device: of the trees.
        is_compiled: whether steps run compiled.
        reads_paths: whether the target has recurrent layers, whose states advance along the path that is kept.
        pricing: of the newest step, or of the next one.
        gives_back: whether the cache has to hold what was kept at the end. To be unset where no one will read it.
    """

    is_compiled: bool = False
    reads_paths: bool = False
    pricing: Pricing = Pricing()
    gives_back: bool = True

    def __init__(self, forward: TargetForward, position_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        target, self._cache = forward.target, forward.cache
        self._pattern = self._cache  # tells which layers have entries of their own, and their windows
        # Plain decoding leaves the text where the caller put it, and so do we; the target reads on its own device.
        self.device = position_ids.device if target.device.type == "meta" else target.device
        self._forward = forward
        self._slots = SlotMap(
            None if attention_mask is None else attention_mask.to(self.device), cached_length(self._cache)
        )
        self._positions = position_ids.to(self.device)
        length = self._positions.shape[-1]
        self._go_on_from(self._positions, length)
        self._last_position = last_position(target.config, length + int(max(map(max, self._shifts))))
        self._is_unsettled = False  # whether an interruption leaves the cache at a length that is not known

    def _note_least(self, nodes: int) -> None:
        """Tell the price of the step that is about to run."""
        self.pricing = self.pricing._replace(least_nodes=nodes)

    def __enter__(self) -> Self:
        self._forward.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.close()
        finally:
            self._forward.__exit__(*exception)

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return max(self._row_ends)

    @property
    def levels_left(self) -> int:
        """Levels below the root that the target's positions allow."""
        if self._last_position is None:
            return sys.maxsize
        return max(self._last_position - int(max(map(max, self._root_positions))), 0)

    @property
    def _row_ends(self) -> list[int]:
        """Positions of each row."""
        return self._slots.row_ends(len(self._shifts))

    @property
    def _root_positions(self) -> list[list[float]]:
        """Of each row's coming root, in each plane."""
        return [[end + shift for shift in shifts] for end, shifts in zip(self._row_ends, self._shifts, strict=True)]

    def _go_on_from(self, position_ids: Tensor, length: int) -> None:
        """Let each row go on from its last position, in each plane; that is the position of slot `length - 1`."""
        shifts = position_ids[..., -1] + 1 - length
        self._shift_by(shifts[:, None].tolist() if shifts.dim() == 1 else shifts.t().tolist())

    def _shift_by(self, shifts: list[list[float]]) -> None:
        """Let each row's positions be its slots and so much more: a number for each plane.

        Some targets count in floats, and get floats.
        """
        self._shifts, first = shifts, shifts[0]
        self._shift: float | Tensor = first[0]  # or `[b, 1]`, or `[planes, b, 1]`
        if len(first) > 1:
            self._shift = torch.tensor(shifts, device=self.device).t()[..., None]
        elif any(shift != first for shift in shifts):
            self._shift = torch.tensor(shifts, device=self.device)

    def prefill(self, tokens: Tensor, chunk_size: int | None = None, **options: Any) -> tuple[Tensor, list[Features]]:
        """Read what the cache lacks of the prompt.

        Args:
            tokens: `[b, t]` the end of the prompt, with at least one token that the cache lacks.
            chunk_size: tokens of one forward; `None` reads all at once.
            options: `logits_to_keep` of the target's forward.

        Returns:
            The logits `[b, any, v]` of the last tokens, and the features of each forward.

        Raises:
            ValueError: the target's cache cannot hold a tree.
        """
        tokens, end = tokens.to(self.device), self._positions.shape[-1]
        offset, features = end - tokens.shape[1], []
        for start in range(self.length, end, chunk_size or end):
            stop = min(start + (chunk_size or end), end)
            logits, caught = self._read_chunk(tokens[:, start - offset : stop - offset], start, **options)
            self._slots.extend([stop - start] * len(tokens))
            features.append(caught)
        self._start(len(tokens))
        return logits, features

    def _read_chunk(self, tokens: Tensor, start: int, **options: Any) -> tuple[Tensor, Features]:
        """Read a part `[b, t]` of the prompt, from the position `start` on: its last logits, and the features."""
        stop = start + tokens.shape[1]
        positions = self._positions[..., start:stop]
        record_windows(self._cache)
        outputs, features = self._forward.read(tokens, self._prefix_mask(stop), positions, **options)
        return outputs.logits, features

    def prefill_by(self, run: Callable[[], Any], rows: int) -> tuple[Tensor, list[Features]]:
        """Let stock `generate` read what the cache lacks of the prompt, with images, sounds or embeddings.

        Args:
            run: reads it into the cache; returns the outputs of the last forward.
            rows: of the prompt, b.

        Returns:
            As `prefill`.

        Raises:
            ValueError: the target reads more or fewer positions than the prompt has, or tells its decoder none.
        """
        self._is_unsettled = True
        outputs, features, positions = self._forward.read_by(run)
        length, found = self._positions.shape[-1], cached_length(self._cache)
        if positions is None or found != length:
            raise ValueError(
                f"{type(self._forward.target).__name__} reads a prompt of {length} positions as {found}, or lets its "
                "decoder count them, so the nodes of a tree have no known positions. Call `generate` with "
                "`policy='plain'`."
            )
        self._go_on_from(positions, length)
        record_windows(self._cache)
        self._slots.extend([length - self.length] * rows)
        self._is_unsettled = False
        self._start(rows)
        return outputs.logits, [features]

    def _start(self, rows: int) -> None:
        """Go on from the prompt to trees."""
        check_cache(self._cache)
        self._shift_by(self._shifts * (rows // len(self._shifts)))
        self._begin_steps()

    @abstractmethod
    def _begin_steps(self) -> None:
        """Make the prompt's cache ready for trees."""

    def _prefix_mask(self, length: int) -> Tensor | None:
        """The two-dimensional mask of the first `length` positions, as `generate` makes it; `None` when all count."""
        visible = self._slots.visible(length, self.device)
        return None if visible is None else visible.long()

    def take_compile_seconds(self) -> float:
        """Seconds of compiling forwards since they were last taken."""
        return 0.0

    @abstractmethod
    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """The logits `[b, n or more, v]` and the features of all nodes, padding last; `keep` or `undo` comes next."""

    @abstractmethod
    def undo(self) -> None:
        """Forget the newest tree."""

    @abstractmethod
    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        """Keep the accepted nodes of the newest tree, and forget its others.

        Args:
            path: `[b, m]` node indices, ascending, the root first; a row that keeps fewer repeats its last.
            paths: the same on the host, without repetitions.
        """

    @abstractmethod
    def keep_rows(self, rows: list[int]) -> None:
        """Decode these rows only, from now on."""

    @abstractmethod
    def target_entries(self) -> TargetEntries:
        """What is kept now; the newest tree is settled."""

    def _owners(self) -> dict[str, int]:
        """Kind of layers -> the last of them that has entries of its own."""
        kinds = getattr(self._forward.target.config.get_text_config(decoder=True), "layer_types", None)
        layers: list[Any] = self._pattern.layers
        named = zip(layers, kinds or ["full_attention"] * len(layers), strict=False)
        return {kind: index for index, (layer, kind) in enumerate(named) if getattr(layer, "keys", None) is not None}

    @property
    def is_even(self) -> bool:
        """Whether all rows end at the same position."""
        return len(set(self._row_ends)) == 1

    def ended_row(self, row: int) -> EndedRow:
        """Copies of what is kept of one row."""
        return EndedRow(self._row_cache(row, self._row_ends[row]), torch.tensor(self._root_positions[row]).view(-1))

    def _row_cache(self, row: int, length: int) -> Cache:
        """A copy of one row's cache."""
        return copied_row(self._cache, row, length)

    def unread_cache(self) -> Cache | None:
        """What `close` would leave in the cache, as one that is filled when it is looked at; `None` where the cache
        holds it already. The verifier has no further use then.
        """
        return None

    def close(self) -> None:
        """Leave only what was kept in the cache, in stock layers: the caller may reuse it. Of a prompt that stock
        `generate` has not read to its end, what stock leaves.
        """
        if not self._is_unsettled:
            crop_to(self._cache, self.length)
        restore_stock_layers(self._cache)


class TreeVerifier(Verifier):
    """Verifies trees over a dynamic cache: a tree's entries follow the text's, and the accepted ones move up."""

    def __init__(self, forward: TargetForward, position_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        super().__init__(forward, position_ids, attention_mask)
        self._mixers = RecurrentMixers(forward.target, self._cache)
        self.reads_paths = bool(self._mixers)
        self._newest_nodes = 0  # nodes of the newest forward, padding included; 0 once it is settled

    @classmethod
    def of(
        cls,
        target: PreTrainedModel,
        prompt_length: int,
        layers: list[int] | None = None,
        *,
        before_deepstack: bool = False,
    ) -> "TreeVerifier":
        """For prompts of one length, without padding; the cache is a new, dynamic one. See `FeatureTap` for the rest,
        which is what a source reads.
        """
        forward = TargetForward.of(target, layers or None, before_deepstack=before_deepstack)
        return cls(forward, torch.arange(prompt_length, device=target.device)[None])

    def __enter__(self) -> Self:
        super().__enter__()
        self._mixers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            super().__exit__(*exception)
        finally:
            self._mixers.__exit__()

    def _begin_steps(self) -> None:
        preallocate(self._cache)

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """As `Verifier.verify`. A lone root gets plain decoding's mask."""
        if tree.node_count == 1 and (self._slots.is_even or not has_windows(self._cache)):
            mask: Any = self._prefix_mask(self.length + 1)
        else:
            mask = self._tree_mask(tree)
        positions = tree_positions(tree, self._roots())
        with self._mixers.reading(tree) as options:
            outputs, features = self._forward.verify(tree.tokens, mask, positions, **options)
        self._newest_nodes = tree.node_count
        return outputs.logits, features

    def _tree_mask(self, tree: DraftTree) -> Tensor | dict[str, Tensor | None]:
        target, prefix_mask = self._forward.target, self._prefix_mask(self.length)
        ends = None if self._slots.is_even else self._slots.ends(tree.tokens.device)
        return tree_attention_mask(target.config, self._cache, prefix_mask, tree, target.dtype, ends)

    def _roots(self) -> Tensor | float:
        """The positions of the coming roots: one, or `[..., b, 1]`."""
        return (self.length if self._slots.is_even else self._slots.ends(self.device)) + self._shift

    def target_entries(self) -> TargetEntries:
        root = DraftTree.root_only(torch.zeros(len(self._shifts), dtype=torch.long, device=self.device))
        found, owners = self._tree_mask(root), self._owners()
        masks = found if isinstance(found, dict) else dict.fromkeys(owners, found)
        return TargetEntries(
            {kind: visible_entries(self._cache, index) for kind, index in owners.items()},
            {kind: mask[..., :-1] for kind, mask in masks.items() if mask is not None and kind in owners},
            tree_positions(root, self._roots()),
        )

    def undo(self) -> None:
        crop(self._cache, self._newest_nodes)
        self._mixers.drop()
        self._newest_nodes = 0

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        self._mixers.keep(path)
        counts = list(map(len, paths))
        if self._slots.stays_even([counts]):
            is_front = paths == [list(range(counts[0]))] * len(paths)
            compact(self._cache, path, self._newest_nodes, is_front=is_front)
            self._slots.extend(counts)
        else:
            slots = self._slots.take([counts], path.device)
            compact_ragged(self._cache, path, self._newest_nodes, slots, self.length)
        self._newest_nodes = 0

    def keep_rows(self, rows: list[int]) -> None:
        self._slots.keep_rows(rows)
        self._shift_by([self._shifts[row] for row in rows])
        keep_rows(self._cache, rows, self.length)
        self._forward.keep_rows(rows)

    def close(self) -> None:
        """As `Verifier.close`. A lone root that was verified stays, as after an interrupted plain step: no state can
        forget it.
        """
        if self._mixers and self._newest_nodes == 1:
            self._slots.extend([1] * len(self._shifts))
            crop(self._cache, 0)
        super().close()


_WINDOW = 128  # slots: the forward sees multiples of it
_MORE = (
    16  # slots of the buffers, so that they never are what a forward sees: equal sizes are compiled as always equal
)
_PART = 256  # tokens of a prompt that compiled code reads at once: of more, it compares too many that no token sees
_PART_STEP, _PART_WINDOW = 4, 32  # of its tokens and slots: a product is prepared once for each of few sizes
_PACKED_STEP = 16  # of the tokens of several rows


class SlotVerifier(Verifier):
    """Verifies trees over buffers in the order of the text.

    Compiled code on a CPU reads the prompt as well; else the prompt is read into a dynamic cache, and moved. `engine`
    is lent to this call; with `None` steps run as they are. `options` are the caller's for `torch.compile`.
    """

    _over_slots: SlotForward

    def __init__(
        self,
        forward: TargetForward,
        engine: SlotEngine | None,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(forward, position_ids, attention_mask)
        self._engine, self._options = engine, options
        self.is_compiled = engine is not None and not engine.is_broken
        self._buffers = SlotBuffers() if engine is None else engine.buffers
        self._rows = 0  # of the buffers: those that are decoded, and copies of the last; 0 before there are any
        self._reads_prompt = False  # whether compiled code does
        self._seen: dict[int, Tensor] = {}  # size of a window -> where it holds no padding
        self._numbers = torch.empty(0, dtype=torch.long, device=self.device)

    @property
    def _places(self) -> list[int]:
        """Slots of each row that are taken; the coming root lies in the next one."""
        return self._row_ends

    def _orders(self, length: int) -> list[Tensor]:
        """Of each row, which of the cache's first `length` positions fill its first slots."""
        return [torch.arange(length)] * len(self._shifts)

    def prefill(self, tokens: Tensor, chunk_size: int | None = None, **options: Any) -> tuple[Tensor, list[Features]]:
        """As `Verifier.prefill`. Compiled code gives the last logits alone."""
        if self._engine is not None and self._compiles_prompt():
            self._pattern = self._engine.pattern(self._forward.target)
            self._reads_prompt = True
            self._start(len(tokens))
        return super().prefill(tokens, chunk_size, **options)

    def _compiles_prompt(self) -> bool:
        """Whether compiled code can read the prompt: each token stands as far from its slot as coming ones will."""
        is_long_rope = longrope_boundary(self._forward.target.config) is not None  # one forward has to read it all
        if not self.is_compiled or self.device.type != "cpu" or self._options is not None or is_long_rope:
            return False
        start, end = self.length, self._positions.shape[-1]
        stands = self._positions[..., start:] == torch.arange(start, end) + self._shift
        seen = self._prefix_mask(end)
        return bool((stands if seen is None else stands | (seen[:, start:] == 0)).all())

    def _start(self, rows: int) -> None:
        if not self._rows:  # a prompt that compiled code reads began by this
            super()._start(rows)

    def _read_chunk(self, tokens: Tensor, start: int, **options: Any) -> tuple[Tensor, Features]:
        if not self._rows:
            return super()._read_chunk(tokens, start, **options)
        size = -(-tokens.shape[1] // -(-tokens.shape[1] // _PART))  # parts of about the same size
        features, caught = Features(self._forward.layers), list[dict[int, Tensor]]()
        for place in range(0, tokens.shape[1], size):
            logits, part = self._outputs(self._part_inputs(tokens[:, place : place + size], start + place))
            logits = logits[0, : self._rows, None] if self.pricing.packs_rows else logits
            caught.append({layer: states[:, :size] for layer, states in part.caught.items()})
        if len(caught) > 1:
            caught = [{layer: torch.cat([part[layer] for part in caught], dim=1) for layer in features.layers}]
        features.caught = {layer: states[:, : tokens.shape[1]] for layer, states in caught[0].items()}
        return logits, features

    def _part_inputs(self, tokens: Tensor, start: int) -> SlotInputs | PackedInputs:
        """As `_inputs`, of a part `[b, t]` of the prompt, from the position `start` on; its last logits are kept."""
        rows, width = tokens.shape
        count = _apart(_rounded_up(width, _PART_STEP), rows)
        size = _rounded_up(start + count + 1, _PART_WINDOW)
        seen, places = self._visible(size), torch.arange(start, start + count)
        # Padding sees itself and stands where a token does: some targets have no other positions.
        first = self._visible(self._positions.shape[-1]).int().argmax(dim=1, keepdim=True)
        depths = torch.maximum(places.clamp(max=start + width - 1), first) - start
        is_own = torch.eye(count, dtype=torch.bool)
        ancestors = seen[:, None, start : start + count] & torch.ones_like(is_own).tril() | is_own
        roots = torch.cat([torch.full((rows, 1), start), torch.tensor(self._shifts) + start], dim=1)
        given = pad(tokens, (0, count - width)), depths, ancestors, roots, seen
        if not self.pricing.packs_rows:
            return SlotInputs(*given, torch.full((_apart(2, rows),), width - 1))
        read = seen[:, start : start + count].clone()
        read[:, width - 1 :] = torch.arange(count - width + 1) == 0
        packed = read.flatten().nonzero().flatten().tolist()
        ends = [end - 1 for end in read.sum(dim=1).cumsum(dim=0).tolist()]
        packed = _filled_up(packed, _apart(_rounded_up(len(packed), _PACKED_STEP), rows, count))
        kept = _filled_up(ends, _apart(rows + 1, count, len(packed)))
        return PackedInputs(*given, torch.tensor(packed), torch.tensor(kept))

    def _begin_steps(self) -> None:
        """Have the prompt's entries in the buffers, or those that it goes on from."""
        self._forward.stop_catching()  # code that is compiled with hooks would always run them
        target = self._forward.target
        kind = forward_over_slots(target, is_batch=len(self._shifts) > 1)
        self._over_slots = kind(target, self._pattern, self._forward.layers, self._options)
        self.pricing = Pricing(packs_rows=kind is PackedForward)
        self._fill(self._positions.shape[-1])

    def _fill(self, length: int) -> None:
        """Have buffers for so many positions and more, with what the cache holds in their first slots."""
        self._rows = len(self._shifts)
        self._buffers.reserve(_parts(self._pattern), self._rows, _windowed(length + _WINDOW) + _MORE)
        if self.length:
            self._buffers.fill(_parts(self._cache), self.length, self._orders(self.length))

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        logits, features = self._outputs(self._inputs(tree))
        if self.pricing.packs_rows:
            logits = _unpacked(logits[0], tree)
        return self._without_padding(tree, logits, features)

    def _outputs(self, inputs: SlotInputs | PackedInputs) -> tuple[Tensor, Features]:
        """Run the forward."""
        outputs = self._outputs_of(inputs, self._buffers.parts())
        features = Features(self._forward.layers)
        features.caught = dict(zip(features.layers, outputs[1:], strict=True))
        return outputs[0], features

    def _outputs_of(self, inputs: Sequence[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        """The logits, and the hidden states of each feature layer."""
        if self._engine is None:
            return self._over_slots(inputs, buffers)
        return self._engine.forward(self._over_slots, inputs, buffers)

    def _without_padding(self, tree: DraftTree, logits: Tensor, features: Features) -> tuple[Tensor, Features]:
        rows, count = tree.tokens.shape
        parts = [logits, *features.caught.values()]
        if any(part.shape[:2] != (rows, count) for part in parts):
            logits, *states = [part[:rows, :count] for part in parts]
            features.caught = dict(zip(features.caught, states, strict=True))
        return logits, features

    def take_compile_seconds(self) -> float:
        return 0.0 if self._engine is None else self._engine.take_compile_seconds()

    def undo(self) -> None:
        """As `Verifier.undo`: the next tree overwrites the newest one."""

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        """As `Verifier.keep`. What moves is computed on the device, which is not waited for."""
        if not self._lie_as_text(paths):
            path = _with_rows(path, self._rows)
            ranks = pad((path[:, 1:] != path[:, :-1]).cumsum(dim=1), (1, 0))
            self._buffers.move(self._slots_of(path), self._newest_roots + ranks)
        self._slots.extend(list(map(len, paths)))

    def _lie_as_text(self, paths: list[list[int]]) -> bool:
        """Whether the nodes of each row's path already follow its text."""
        return all(nodes[-1] < len(nodes) for nodes in paths)

    def _slots_of(self, nodes: Tensor) -> Tensor:
        """Where these nodes `[rows of the buffers, m]` of the newest tree lie."""
        return self._newest_roots + nodes

    def keep_rows(self, rows: list[int]) -> None:
        """Decode these rows only, from now on.

        Of a batch two are kept on a CPU, since one row alone is compiled apart; elsewhere all are, for their graphs.
        """
        self._slots.keep_rows(rows)
        self._shift_by([self._shifts[row] for row in rows])
        kept = _filled_up(rows, min(self._rows, 2) if self.device.type == "cpu" else self._rows)
        self._rows, self._seen = len(kept), {}
        self._buffers.keep_rows(kept, self.length)

    def _row_cache(self, row: int, length: int) -> Cache:
        if not self._rows:
            return super()._row_cache(row, length)
        cache = copied_row(self._cache, 0, 0)
        self._give_back(self._orders(length)[row : row + 1], row, cache, length)
        return cache

    def unread_cache(self) -> Cache | None:
        """As `Verifier.unread_cache`: from the buffers, until the next call writes to them."""
        if not self._rows or not self.length or not self.is_even:
            return None
        cache, orders, length = self._cache, self._orders(self.length), self.length
        mode = torch.is_inference_mode_enabled()  # of this call, and not of who looks

        def make() -> Cache:
            with torch.inference_mode(mode):
                self._give_back(orders, 0, cache, length)
            return cache

        unread = UnreadDynamicCache(make)
        self._buffers.lend(unread)
        self.gives_back = False
        return unread

    def close(self) -> None:
        """Give the cache what was kept, in its own order; rows that differ in length have no further use."""
        if self.gives_back and self._rows and self.length and self.is_even:
            self._give_back(self._orders(self.length), 0, self._cache, self.length)
        super().close()

    def _give_back(self, orders: list[Tensor], first: int, cache: Cache, length: int) -> None:
        """Let a cache hold `length` positions of the row `first` and the next ones."""
        positions = torch.arange(length)
        slots = torch.stack([torch.searchsorted(order, positions, right=True) for order in orders]) - 1
        parts = self._buffers.entries(slots.clamp(min=0), first)
        give_back(parts, cache, filled(self._pattern), length)

    def target_entries(self) -> TargetEntries:
        rows, size = len(self._shifts), _windowed(max(self._places))
        ends, planes = torch.tensor(self._places)[:, None], torch.tensor(self._root_positions)  # [b, planes]
        host = [ends, planes]
        ends, planes = host if self.device.type == "cpu" else moved(host, self.device)
        distance = ends - torch.arange(size, device=self.device)
        seen = self._visible(size)[:rows] & (distance > 0)
        parts, indices = self._buffers.parts(), filled(self._pattern)
        states, masks = {}, {}
        for kind, index in self._owners().items():
            place, window = 2 * indices.index(index), window_of(self._pattern, index)
            keys, values = (part[:rows, :, :size] for part in parts[place : place + 2])
            states[kind] = keys, values
            shown = seen if window is None else seen & (distance < window)
            minimum = torch.finfo(keys.dtype).min
            masks[kind] = torch.zeros_like(shown, dtype=keys.dtype).masked_fill_(~shown, minimum)[:, None, None]
        return TargetEntries(states, masks, planes if planes.shape[1] == 1 else planes.t()[..., None])

    def _visible(self, size: int) -> Tensor:
        """`[rows of the buffers, size]`, false where a slot holds padding."""
        if size not in self._seen:
            self._seen[size] = self._slots.unpadded(size, self._rows, self.device)
        return self._seen[size]

    def _inputs(self, tree: DraftTree) -> SlotInputs | PackedInputs:
        """The inputs of a forward over `tree`, padded to rows and nodes."""
        beside = LEAST_ROWS if self.pricing.packs_rows else self._rows
        count = self._apart(padded_count(self.device, tree.node_count, beside))
        nodes, seen = self._nodes(tree, count), self._visible(self._reserve(max(self._places) + count))
        if not self.pricing.packs_rows:
            self._note_least(self._apart(padded_count(self.device, 1, self._rows)))
            return SlotInputs(*nodes, seen, self._first(count))
        packed = [row * count + node for row, own in enumerate(tree.row_sizes) for node in range(own)]
        self._note_least(1 + max(LEAST_ROWS - len(tree.tokens), 0))
        packed = _filled_up(packed, self._apart(max(len(packed), LEAST_ROWS), count))
        return PackedInputs(*nodes, seen, torch.tensor(packed), self._first(len(packed)))

    def _apart(self, count: int, *others: int) -> int:
        """A number from `count` on, which is none of rows or `others` where a step may be what is compiled first."""
        return count if self._reads_prompt else _apart(count, self._rows, *others)

    def _first(self, count: int) -> Tensor:
        """0 to before `count`, without a kernel in each step."""
        if len(self._numbers) < count:
            self._numbers = torch.arange(_rounded_up(count, _WINDOW), device=self.device)
        return self._numbers[:count]

    def _reserve(self, count: int) -> int:
        """Have so many slots; returns how many the forward sees."""
        size = _windowed(count)
        if size > self._buffers.size:
            self._buffers.grow(2 * size + _MORE)
        return size

    def _nodes(self, tree: DraftTree, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, depths, ancestors and roots of a tree, padded to rows and nodes."""
        places, positions = (_filled_up(part, self._rows) for part in (self._places, self._root_positions))
        roots = torch.tensor([[place, *planes] for place, planes in zip(places, positions, strict=True)])
        if self.device.type != "cpu":
            (roots,) = moved([roots], self.device)
        padded = tree.padded(count)
        nodes = (_with_rows(part, self._rows) for part in (padded.tokens, padded.depths, padded.ancestors))
        tokens, depths, ancestors = nodes
        self._newest_roots = roots[:, :1].long()
        return tokens, depths, ancestors, roots


class HybridVerifier(SlotVerifier):
    """Verifies trees of a target with recurrent layers, which read a tree all at once and whose states advance along
    what is kept. The prompt is read as it is.
    """

    reads_paths = True
    _over_slots: HybridForward
    _states: Sequence[Tensor] = ()  # of the rows of the buffers, see `StateKinds`
    _noted: tuple[Tensor, ...] = ()  # of the newest tree: what advances them

    def _compiles_prompt(self) -> bool:
        """No: stock's scans read it."""
        return False

    def _fill(self, length: int) -> None:
        self._states = self._over_slots.states.of(self._cache)
        super()._fill(length)

    def _outputs_of(self, inputs: Sequence[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = super()._outputs_of([*inputs, *self._states], buffers)
        count = 1 + len(self._forward.layers)
        self._noted = outputs[count:]
        return outputs[:count]

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        kinds = self._over_slots.states
        kinds.advance(kinds.by_layer(self._states), self._noted, _with_rows(path, self._rows))
        super().keep(path, paths)

    def keep_rows(self, rows: list[int]) -> None:
        super().keep_rows(rows)
        kept = torch.tensor(_filled_up(rows, self._rows), device=self.device)
        self._states = [part.index_select(1, kept) for part in self._states]

    def _give_back(self, orders: list[Tensor], first: int, cache: Cache, length: int) -> None:
        super()._give_back(orders, first, cache, length)
        self._over_slots.states.give_back(self._states, cache, slice(first, first + len(orders)))


_CHUNK = 128  # tokens of a prompt that one forward reads; their results do not depend on it
_TRIED = (2, 3, 4, 5, 8, 17, 32, 48)  # nodes of chains with which compiled code is tried
_PLACE = 100  # of the text after which they stand


class InvariantVerifier(SlotVerifier):
    """Verifies trees so that the logits of a node are those of its text, whatever else is in the forward.

    The prompt is read over the same buffers, as a chain of tokens. A row's text begins at slot 0, without padding.
    Where kernels go by whole shapes, each forward has one number of nodes, of one row; larger trees take several.
    Compiled code on a CPU multiplies by kernels of ours, in which no row knows another.

    Args:
        forward: as in `Verifier`.
        engine: the target's. Where `compiles`, it is lent to this call.
        needs: rows that are computed together, as `RowClasses` finds them.
        position_ids: as in `Verifier`.
        attention_mask: as in `Verifier`.
        compiles: whether steps run compiled, and on a CPU the prompt.
    """

    _over_slots: InvariantForward

    def __init__(
        self,
        forward: TargetForward,
        engine: SlotEngine,
        needs: RowNeeds,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        compiles: bool = False,
    ) -> None:
        super().__init__(forward, engine if compiles else None, position_ids, attention_mask)
        self._needs, self._pattern = needs, engine.pattern(forward.target)
        given = engine.lock, needs.forward, forward.target, self._pattern
        self._compiles_all = compiles and not needs.is_exact
        self.pricing = Pricing(paths_cost=not self._compiles_all)  # to kernels of ours a path is some more rows
        self._eagerly = InvariantForward(*given, [])
        self._over_chunks = InvariantForward(*given, forward.layers if self._compiles_all else [])
        self._over_slots = self._over_chunks  # features are outputs of compiled code, else hooks catch them
        if needs.is_exact:
            self._over_slots = PartForward(*given, forward.layers if compiles else [])
        self._fewest = LEAST_ROWS if is_prepacked(forward.target) else 1  # stock layers take longer for more rows
        self._hidden: list[int] = []  # of each row, positions of its prompt that are no text

    @property
    def _places(self) -> list[int]:
        return [end - hidden for end, hidden in zip(self._row_ends, self._hidden, strict=True)]

    def _orders(self, length: int) -> list[Tensor]:
        seen = self._slots.unpadded(length, len(self._shifts), torch.device("cpu"))
        return [row.nonzero().flatten() for row in seen]

    def _visible(self, size: int) -> Tensor:
        return torch.ones(self._rows, size, dtype=torch.bool, device=self.device)

    def _begin_steps(self) -> None:
        end = self._positions.shape[-1]
        self._hidden = [end - len(order) for order in self._orders(end)]
        self._buffers.clear()
        self._fill(end)

    def prefill(self, tokens: Tensor, chunk_size: int | None = None, **options: Any) -> tuple[Tensor, list[Features]]:
        """As `Verifier.prefill`. No chunk is larger than suits the machine."""
        self._start(len(tokens))
        orders = [order.to(self.device) for order in self._orders(self._positions.shape[-1])]
        tokens, positions = (
            tokens.to(self.device),
            self._positions.expand(*self._positions.shape[:-2], len(tokens), -1),
        )
        largest, together = _CHUNK, [slice(None)]
        if self._needs.is_exact:
            largest, together = self._needs.forward, [slice(row, row + 1) for row in range(len(tokens))]
        elif self._compiles_all:
            self._forward.stop_catching()  # see `SlotVerifier`
            largest = _tried(len(tokens))[-1]
        logits, caught = list[Tensor](), list[dict[int, Tensor]]()
        for rows in together:
            prompt = _PromptTexts(tokens[rows], positions[..., rows, :], orders[rows], self.length, rows.start)
            found, states = self._read_all(prompt, min(chunk_size or largest, largest))
            logits += found
            caught.append(states)
        self._slots.extend([positions.shape[-1] - self.length] * len(tokens))
        if self._engine is not None:
            self._forward.stop_catching()
        features = Features(self._forward.layers)
        features.caught = {layer: torch.cat([states[layer] for states in caught]) for layer in caught[0]}
        return torch.stack(logits), [features]

    def _read_all(self, prompt: "_PromptTexts", size: int) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Read rows in chunks: the last logits `[1, v]` of each, and the features `[b, length, h]`."""
        logits: list[Tensor] = [torch.empty(0)] * len(prompt.counts)
        read = [self._read(prompt, start, size, logits) for start in range(0, max(prompt.counts), size)]
        joined = {layer: torch.cat([caught[layer] for caught in read], dim=1) for layer in read[0]}
        return logits, {layer: prompt.padded(states) for layer, states in joined.items()}

    def _read(self, prompt: "_PromptTexts", start: int, size: int, logits: list[Tensor]) -> dict[int, Tensor]:
        """Read each row's next tokens. Rows that end with them get their `logits` `[1, v]`. Returns the features."""
        width = min(size, prompt.tokens.shape[1] - start)
        if self._engine is not None and not self._engine.sample:
            self._engine.sample = prompt.tokens[0, : 2 * _PLACE].tolist()
        self._check_code(len(prompt.counts))
        step = self._step(len(prompt.counts))
        count = self._count(width, step)
        read = torch.arange(count)
        chosen = start + read.clamp(max=width - 1)
        left = torch.tensor(prompt.counts)[:, None] - start
        roots = torch.tensor(prompt.starts)[:, None] + start + left.clamp(max=0)
        depths = torch.minimum(read, (left - 1).clamp(min=0))
        ends = {row: end - 1 - start for row, end in enumerate(prompt.counts) if start < end <= start + width}
        asked = sorted(set(ends.values()))
        others = [node for node in range(count) if node not in asked]
        kept = asked + others[: _rounded_up(max(len(asked), 2), step) - len(asked)]
        end, layout = int(roots.max()) + count, self._layout(roots, depths, count)
        of_nodes = [depths, roots, torch.tensor(kept), *layout]
        if self.device.type != "cpu":
            chosen, *of_nodes = moved([chosen, *of_nodes], self.device)
        depths, roots, chosen_logits, *parts = of_nodes
        positions = prompt.positions[..., chosen].view(-1, *depths.shape).permute(1, 2, 0)
        inputs = InvariantInputs(prompt.tokens[:, chosen], depths, roots, positions, chosen_logits)
        self._reserve(max(end, layout.shared.numel()))
        found, caught = self._run(self._over_chunks, (*inputs, *parts), self._buffers.parts(prompt.row))
        for row, end in ends.items():
            logits[row] = found[row, kept.index(end)][None]
        return {layer: part[:, :width] for layer, part in caught.items()}

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        if self._needs.is_exact:
            self._note_least(self._needs.forward)
            logits, caught = self._in_parts(tree, self._needs.forward)
        else:
            is_chain = all(parents == [0, *range(tree.node_count - 1)] for parents in tree.parents.tolist())
            self._check_code(self._rows)
            step = self._step(self._rows)
            self._note_least(self._count(1, step))
            count = self._count(tree.node_count, step)
            nodes, depths, ancestors, roots = self._nodes(tree, count)
            layout = self._layout(self._newest_roots, depths, tree.node_count, None if is_chain else ancestors)
            positions = node_positions(roots[:, 1:], depths)
            given = nodes, depths, self._newest_roots, positions, self._first(count)
            self._reserve(max(max(self._places) + count, layout.shared.numel()))
            logits, caught = self._run(self._over_slots, (*given, *layout), self._buffers.parts())
        features = Features(self._forward.layers)
        features.caught = caught
        return self._without_padding(tree, logits, features)

    def _in_parts(self, tree: DraftTree, step: int) -> tuple[Tensor, dict[int, Tensor]]:
        """Run forwards over `step` nodes of a row each; of a larger tree, those before them lie in their slots."""
        count = _rounded_up(tree.node_count, step)
        tokens, depths, ancestors, roots = self._nodes(tree, count)
        rows, blocks = len(tree.tokens), self._first(self._reserve(max(self._places) + count) // BLOCK)
        read = list[tuple[Tensor, dict[int, Tensor]]]()
        for row, place in enumerate(self._places):
            own, levels = slice(row, row + 1), self._first(levels_below(place, tree.level_count))
            for stop in range(step, count + 1, step):
                nodes = tokens[own, stop - step : stop], depths[own, :stop], ancestors[own, :stop, :stop]
                inputs = PartInputs(*nodes, roots[own], blocks, levels)
                logits, caught = self._run(self._over_slots, inputs, self._buffers.parts(row), row)
                if self._engine is not None and rows * count > step:  # a graph writes to the same place again
                    logits, caught = logits.clone(), {layer: part.clone() for layer, part in caught.items()}
                read.append((logits, caught))

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts, dim=1).view(rows, count, -1) if len(parts) > 1 else parts[0]

        found = {layer: joined([caught[layer] for _, caught in read]) for layer in read[0][1]}
        return joined([logits for logits, _ in read]), found

    def _count(self, nodes: int, step: int) -> int:
        """Of a step of so many nodes, with padding: a multiple."""
        if not self._compiles_all:
            return _rounded_up(max(nodes, -(-self._fewest // self._rows)), step)
        count = _rounded_up(padded_count(self.device, nodes, self._rows), step)
        return count + step * (count == self._rows)  # what is equal at first is compiled as always equal

    def _layout(self, roots: Tensor, depths: Tensor, count: int, ancestors: Tensor | None = None) -> Layout:
        """Of a chain, or of a tree with these `ancestors`; nodes after the first `count` are padding."""
        least = 2 if self._compiles_all else 0
        if ancestors is None:
            layout = Layout.of_chain(roots, depths, least)
        else:
            layout = Layout.of_tree(roots, depths, ancestors, least)
        return layout.of_nodes(count, compiled=self._compiles_all)

    def _run(
        self, forward: InvariantForward, inputs: tuple[Tensor, ...], buffers: list[Tensor], row: int = 0
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run a forward: logits, and the features of each layer. `row` as in `SlotEngine.forward`.

        Raises:
            RuntimeError: it cannot be compiled. Without compilation it rounds otherwise.
        """
        if self._engine is None or forward is not self._over_slots:
            outputs, features = self._forward.catch(lambda: forward(inputs, buffers))
            return outputs[0], features.caught
        outputs = self._engine.forward(forward, inputs, buffers, row)
        if self._engine.is_broken:
            raise RuntimeError(
                f"The target's steps could not run compiled: {self._engine.obstacle}. As they are, they round "
                "otherwise, so call `generate` with `compile=False` to write a text in one way."
            )
        return outputs[0], dict(zip(self._forward.layers, outputs[1:], strict=True))

    def _step(self, rows: int) -> int:
        """What the nodes of so many rows must be a multiple of."""
        return self._needs.forward // gcd(self._needs.forward, rows)

    def _check_code(self, rows: int) -> None:
        """Compare, once for each compiled code, nodes beside others, and with those of other code.

        Raises:
            ValueError: it rounds a node by the nodes beside it, or otherwise than what was compiled before.
        """
        if self._engine is None or not self._compiles_all:
            return
        engine, settings = self._engine, tuple(kernel_settings().values())
        code = rows, *self._forward.layers, *settings
        if code in engine.checked:
            return
        with engine.preparing():
            *fewer, most = _tried(rows)
            buffers = self._trial_buffers(engine.sample, rows, most)
            known = self._answer(engine.sample, most, buffers, is_chain=True)
            found = [self._answer(engine.sample, count, buffers, is_chain=True) for count in fewer]
            found += [self._answer(engine.sample, count, buffers, is_chain=False) for count in _TRIED]
        if not all(torch.equal(logits, known[: len(logits)]) for logits in found):
            self._refuse("a row by what stands beside it")
        bits = sha256(known[: _TRIED[-1]].contiguous().view(torch.uint8).numpy().tobytes()).digest()
        if engine.bits.setdefault(settings, bits) != bits:
            self._refuse("a text in several ways")
        engine.checked.add(code)

    def _trial_buffers(self, sample: Sequence[int], rows: int, count: int) -> list[Tensor]:
        """Buffers that hold the first tokens of a sample of text in each row, and take `count` more."""
        buffers = SlotBuffers()
        buffers.reserve(_parts(self._pattern), rows, _windowed(_PLACE + self._count(count, 1)) + _MORE)
        nodes = torch.arange(_PLACE).expand(rows, -1)
        inputs = self._trial_inputs(sample, nodes, 0)
        self._eagerly((*inputs, *Layout.of_chain(inputs.roots, nodes)), buffers.parts())
        return buffers.parts()

    def _answer(self, sample: Sequence[int], count: int, buffers: list[Tensor], *, is_chain: bool) -> Tensor:
        """The logits of compiled code to a chain of so many nodes, `[count, v]`, the same in each row."""
        rows = len(buffers[0])
        parents = (torch.arange(count) - 1).clamp(min=0).expand(rows, -1)
        tree = DraftTree.from_parents(torch.zeros_like(parents), parents).padded(self._count(count, 1))
        inputs = self._trial_inputs(sample, tree.depths, _PLACE)
        layout = self._layout(inputs.roots, tree.depths, count, None if is_chain else tree.ancestors)
        return self._run(self._over_slots, (*inputs, *layout), buffers)[0][0, :count]

    def _trial_inputs(self, sample: Sequence[int], depths: Tensor, place: int) -> InvariantInputs:
        """Of tokens of a sample, which goes on as it began, at `depths` `[b, n]` below a place."""
        places = place + depths
        tokens = torch.tensor(sample)[places % len(sample)]
        last = sys.maxsize if self._last_position is None else self._last_position
        planes = torch.zeros_like(torch.tensor(self._shifts[0]))  # some targets count in floats
        positions = (places[..., None] + planes).clamp(max=last)
        return InvariantInputs(
            tokens, depths, torch.full((len(depths), 1), place), positions, self._first(depths.shape[1])
        )

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{type(self._forward.target).__name__} rounds {what} when it runs compiled: only kernels of ours do not, "
            "in bfloat16, on CPUs with AVX512-BF16, in code that is kept. Call `generate` with `compile=False`."
        )

    def keep_rows(self, rows: list[int]) -> None:
        self._hidden = [self._hidden[row] for row in rows]
        super().keep_rows(rows)

    def _reserve(self, count: int) -> int:
        if not self._needs.is_exact:
            return super()._reserve(count)
        size = max(1 << (count - 1).bit_length(), _WINDOW)  # few sizes: each is captured by itself
        if size > self._buffers.size:
            self._buffers.grow(size)
        return size


def _tried(rows: int) -> tuple[int, ...]:
    """Nodes of chains with which compiled code is tried, those of a part of a prompt last."""
    largest = _CHUNK // rows // 16 * 16
    return (*_TRIED, *((largest - 28, largest) if largest > _TRIED[-1] else ()))


class _PromptTexts:
    """What is new of each row's prompt, without padding.

    Args:
        tokens: `[b, any]` the end of the prompts.
        position_ids: `[b or 1, s]`, or `[planes, b or 1, s]`, of the whole prompts.
        orders: of each row, which of the s are text, ascending.
        known: positions that the cache holds.
        row: of the buffers, if they are of one.

    Attributes:
        tokens: `[b, t]`; a row that has fewer repeats its last.
        positions: `[..., b, t]` of them.
        counts: new tokens of each row.
        starts: tokens of each row before them.
        length: new positions of the prompts, padding included.
    """

    def __init__(
        self, tokens: Tensor, position_ids: Tensor, orders: list[Tensor], known: int, row: int | None = None
    ) -> None:
        self.row, self.length = row, position_ids.shape[-1] - known
        self._orders = [order[order >= known] for order in orders]
        self.counts = list(map(len, self._orders))
        self.starts = [len(order) - count for order, count in zip(orders, self.counts, strict=True)]
        longest = torch.arange(max(self.counts), device=tokens.device)
        index = torch.stack([order[longest.clamp(max=len(order) - 1)] for order in self._orders])
        self.tokens = tokens.gather(1, index - (position_ids.shape[-1] - tokens.shape[1]))
        self.positions = position_ids.expand(*position_ids.shape[:-2], len(tokens), -1).gather(
            -1, index.expand(*position_ids.shape[:-2], -1, -1)
        )
        self._known = known

    def padded(self, states: Tensor) -> Tensor:
        """States `[b, t or more, h]` of the tokens, where they stand in the prompts: `[b, length, h]`."""
        places = torch.arange(self._known, self._known + self.length, device=states.device)
        index = torch.stack([torch.searchsorted(order, places, right=True) for order in self._orders]) - 1
        return states.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))


def _parts(cache: Cache) -> list[Tensor]:
    """Keys and values of each layer that holds some, in turn."""
    layers: list[Any] = cache.layers
    return [part for index in filled(cache) for part in (layers[index].keys, layers[index].values)]


def _filled_up(rows: list[Row], count: int) -> list[Row]:
    """At least `count` rows, the last one repeated."""
    return rows + rows[-1:] * (count - len(rows))


def _with_rows(part: Tensor, count: int) -> Tensor:
    """`[b, ...]` -> `[count, ...]`, the last row repeated."""
    missing = count - len(part)
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part


def _apart(count: int, *others: int) -> int:
    """The first number from `count` on that is no other: what is equal at first is compiled as always equal."""
    return next(number for number in range(count, count + len(others) + 1) if number not in others)


def _unpacked(logits: Tensor, tree: DraftTree) -> Tensor:
    """Of the nodes that count `[r or more, v]`, one row after the other, as `[b, n, v]`; the others have any."""
    rows, count = tree.tokens.shape
    if not tree.sizes:
        return logits[: rows * count].view(rows, count, -1)
    ends = list(accumulate(tree.sizes))
    places = [
        min(end - size + node, end - 1) for end, size in zip(ends, tree.sizes, strict=True) for node in range(count)
    ]
    return logits.index_select(0, torch.tensor(places)).view(rows, count, -1)


def _windowed(count: int) -> int:
    return _rounded_up(count, _WINDOW)


def _rounded_up(count: int, step: int) -> int:
    """The next multiple."""
    return -(-count // step) * step
