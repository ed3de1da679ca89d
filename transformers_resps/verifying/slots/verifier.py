"""Verify trees over slots, compiled or not, with recurrent layers or without."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from ...tree import DraftTree, Pricing, moved
from ..attention import longrope_boundary
from ..cache import copied_row, window_of
from ..forward import Features, TargetForward
from ..returned import UnreadDynamicCache
from ..verifier import TargetEntries, Verifier
from .buffers import SlotBuffers, filled, give_back
from .engine import LEAST_ROWS, SlotEngine, padded_count
from .forwards import HybridForward, PackedForward, PackedInputs, SlotForward, SlotInputs, forward_over_slots


Row = TypeVar("Row")


_WINDOW = 128  # slots: the forward sees multiples of it


# Extra slots, so that a buffer is never as long as the window that a forward reads: code compiled where two sizes are
# equal assumes that they stay equal.
_MORE = 16


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
        layers = None if self.device.type == "cpu" else self._forward.layers  # a graph would keep all that it gives
        self._over_slots = kind(target, self._pattern, layers, self._options)
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
        features.caught = self._over_slots.features(outputs, inputs, features.layers)
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
        self._noted = self._over_slots.noted(outputs)
        return outputs

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
    """The smallest number from `count` on that is not among `others`: equal example sizes would become one symbol."""
    return next(number for number in range(count, count + len(others) + 1) if number not in others)


def _unpacked(logits: Tensor, tree: DraftTree) -> Tensor:
    """Logits `[r or more, v]` of the nodes that count, row by row, as `[b, n, v]`; those of padding are arbitrary."""
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
