"""Buffers in the order of the text that live from call to call: the entry at place i of a row's text lies in slot i.

A tree's nodes lie in the slots after the text, and the accepted ones move to their places. The forward sees few sizes,
so that it can be compiled or captured.
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..compat import CACHE_KEYWORD
from ..compilation.captured import CapturedFunction
from ..compilation.compiled import CompiledFunction
from ..compilation.engine import Code, CompileEngine, WeightFingerprint, is_of_this_mode
from ..compilation.pages import zeros
from .attention import GROUPED, STOCK, PackedNodes, use_gqa_attention
from .cache import holds_state, replace_entries, window_of
from .experts import use_invariant_experts
from .forward import hidden_states_asked, output_places
from .hybrids import RECURRENT_KINDS, StateKinds, TreeReaders, WholeTree, WholeTreeCache, is_recurrent, known_mixers
from .invariant import BlockReads, Layout, Sizes, use_invariant_attention


class SlotLayer(CacheLayerMixin):
    """One layer's buffers, `[b, kv heads, capacity, hd]`, in a forward that writes the slots `written` `[b, n]`.

    It sees the first slots, so many as `size` says.
    """

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, written: Tensor, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers, self._written, self._size = (keys, values), written, size
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[b, kv heads, n, hd]` entries; returns what is seen, `[b, kv heads, slots, hd]`."""
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            self._write(buffer, states)
        keys, values = (buffer[:, :, : self._size] for buffer in self._buffers)
        return keys, values

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        if self._written.shape[0] == 1:
            buffer.index_copy_(2, self._written[0], states)
        else:
            buffer[_rows(self._written), :, self._written] = states.transpose(1, 2)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The buffers are there."""

    def get_seq_length(self) -> int:
        """Zero: positions are passed to the forward, and so is the mask."""
        return 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """The slots, from 0 on."""
        return self._size, 0

    def get_max_length(self) -> int:
        """The slots."""
        return self._size

    get_max_cache_shape = get_max_length


class _PackedSlotLayer(SlotLayer):
    """Of `PackedInputs`: `written` are the slots and the rows of the nodes, `[2, r]`."""

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        slots, rows = self._written
        buffer[rows, :, slots] = states[0].transpose(0, 1)


class _FiniteSlotLayer(SlotLayer):
    """Of the invariant mode: what overflows float16 is kept as 0, since a node that does not see NaN would get it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if key_states.dtype is torch.float16:
            key_states, value_states = (part.nan_to_num(0.0, 0.0, 0.0) for part in (key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)


def _rows(slots: Tensor) -> Tensor:
    return torch.arange(slots.shape[0], device=slots.device)[:, None].expand_as(slots)


class SlotBuffers:
    """The buffers of all layers of a target, as large as any call needed so far; kept from call to call."""

    def __init__(self) -> None:
        self._stores: list[Tensor] = []  # `[parts, b, kv heads, slots, hd]`: parts that are alike move at once
        self._rooms: list[Tensor] = []  # of the stores: keys and values of the first layer, of the second, and so on
        self._rows = 0  # the first ones, which are in use
        self._parts: dict[int | None, list[Tensor]] = {}
        self._unread: ref[Cache] | None = None

    def lend(self, cache: Cache) -> None:
        """Have a cache copy what it holds of these buffers before it is overwritten, if it lives until then."""
        self._unread = ref(cache)

    def _settle(self) -> None:
        cache, self._unread = None if self._unread is None else self._unread(), None
        if cache is not None:
            len(cache.layers)  # a look fills it

    @property
    def size(self) -> int:
        """Slots."""
        return self._rooms[0].shape[2] if self._rooms else 0

    def parts(self, row: int | None = None) -> list[Tensor]:
        """Keys and values `[b, kv heads, slots, hd]` of the first layer, the second, ..., the same tensors each time.

        Of one row alone where `row` names it.
        """
        if row not in self._parts:
            rows = slice(self._rows) if row is None else slice(row, row + 1)
            self._parts[row] = [_no_view(room[rows]) for room in self._rooms]
        return self._parts[row]

    def reserve(self, kinds: Sequence[Tensor], rows: int, size: int) -> None:
        """Have at least `size` slots for so many rows, and zeros in those that are new.

        `kinds` are entries `[any, kv heads, any, hd]` of each part.
        """
        self._settle()
        shapes = [(part.shape[1], part.shape[3], part.dtype, part.device) for part in kinds]
        known = [(room.shape[1], room.shape[3], room.dtype, room.device) for room in self._rooms]
        is_large = self.size >= size and known == shapes and len(self._rooms[0]) >= rows
        if not is_large or not is_of_this_mode(self._rooms[0]):
            self._stores, free = [], {}
            for shape, count in Counter(shapes).items():
                heads, width, dtype, device = shape
                store = zeros(count, rows, heads, size, width, dtype=dtype, device=device)
                self._stores.append(store)
                free[shape] = iter(store)
            self._rooms = [next(free[shape]) for shape in shapes]
        self._use(rows)

    def fill(self, parts: Sequence[Tensor], length: int, orders: Sequence[Tensor]) -> None:
        """Take over entries of dynamic layers.

        Args:
            parts: `[b, kv heads, s, hd]`, keys and values in turn; of a sliding layer the last ones only.
            length: of the rows in those layers.
            orders: of each row of the buffers, which of these go to its first slots, ascending; copies of the last row
                fill those that are too many.
        """
        for buffer, part in zip(self.parts(), parts, strict=True):
            first = length - part.shape[2]
            for row, order in enumerate(orders):
                kept = order[order >= first].to(part.device)
                stop = len(order)
                buffer[row, :, stop - len(kept) : stop] = part[min(row, len(part) - 1), :, kept - first]

    def clear(self) -> None:
        """Forget all entries: what an overflow left would reach a text from a slot that no node sees."""
        self._settle()
        for store in self._stores:
            store.zero_()

    def grow(self, size: int) -> None:
        """Move to buffers of `size` slots."""
        before = self.parts()
        self.reserve(before, self._rows, size)
        for buffer, part in zip(self.parts(), before, strict=True):
            buffer[:, :, : part.shape[2]] = part

    def move(self, slots: Tensor, to: Tensor) -> None:
        """Copy each row's entries in `slots` `[b, m]` to the slots `to`, in all parts."""
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        for store in self._stores:
            store[:, rows, :, to] = store[:, rows, :, slots]

    def keep_rows(self, rows: list[int], length: int | None = None) -> None:
        """Forget all rows but these, and all but their first `length` slots."""
        if rows != list(range(len(rows))):
            order = torch.tensor(rows)
            for part in self.parts():
                order = order.to(part.device)  # once, unless layers lie on several devices
                part[: len(rows), :, :length] = part[:, :, :length].index_select(0, order)
        self._use(len(rows))

    def entries(self, slots: Tensor, first: int = 0) -> list[Tensor]:
        """Copies of what lies in each row's `slots` `[b, s]`, which the host knows: `[b, kv heads, s, hd]`, keys and
        values in turn.

        `slots` are those of the row `first` and the next ones.
        """
        of_rows, length = slice(first, first + len(slots)), slots.shape[1]
        if bool((slots == torch.arange(length)).all()):  # nothing to gather, and one copy
            return [part[of_rows, :, :length].clone(memory_format=torch.contiguous_format) for part in self.parts()]
        found = []
        for part in self.parts():
            slots = slots.to(part.device)  # once, unless layers lie on several devices
            rows = torch.arange(of_rows.start, of_rows.stop, device=slots.device)[:, None]
            found.append(part[rows, :, slots].transpose(1, 2))
        return found

    def _use(self, rows: int) -> None:
        self._rows, self._parts = rows, {}


def _no_view(part: Tensor) -> Tensor:
    """The same memory where code is compiled, which would look for what a view is of."""
    if part.device.type != "cpu":
        return part
    storage, start = part.untyped_storage(), part.storage_offset()
    return part.new_empty(0).set_(storage, start, part.shape, part.stride())  # type: ignore[call-overload, no-any-return]


def filled(cache: Cache) -> list[int]:
    """The layers that hold entries; one that shares another's keys has none."""
    return [index for index, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]


def give_back(parts: list[Tensor], cache: Cache, indices: list[int], length: int) -> None:
    """Let these dynamic layers of a cache hold entries `[b, kv heads, s, hd]` of `length` positions.

    `parts` are keys and values in turn. A layer may hold nothing yet.
    """
    for index, keys, values in zip(indices, parts[::2], parts[1::2], strict=True):
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if getattr(layer, "keys", None) is None:
            cache.update(keys.contiguous(), values.contiguous(), index)
            continue
        kept = min(length, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else length
        replace_entries(layer, [part[:, :, length - kept :].contiguous() for part in (keys, values)], length)


class SlotInputs(NamedTuple):
    """A tree or a part of a prompt, and where it stands. Node i lies in the slot i after the root's place.

    Attributes:
        tokens: `[b, n]`.
        depths: `[b, n]` below the root.
        ancestors: `[b, n, n]` bool, see `DraftTree`.
        roots: `[b, 1 + planes]` the root's place in the text, and its positions.
        seen: `[b, slots]` false where a slot holds padding.
        kept: `[k]` the nodes whose logits are computed, in their order.
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    roots: Tensor
    seen: Tensor
    kept: Tensor


class PackedInputs(NamedTuple):
    """As `SlotInputs`, where rows have trees of different sizes, and no more than these is computed.

    Attributes:
        packed: `[r]` the computed nodes, as places in the `b * n` of all rows.
        kept: `[k]` which of those get logits.
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    roots: Tensor
    seen: Tensor
    packed: Tensor
    kept: Tensor


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


# Sizes of the inputs and of the buffers: those with a letter change from call to call, b only in batches.
_SIZES = ("bn", "bn", "bnn", "b.", "bs", "k")
_PACKED_SIZES = ("bn", "bn", "bnn", "b.", "bs", "r", "k")
_INVARIANT_SIZES = ("bn", "bn", "b.", "bn.", "k", "s.", "bn", "r", "bg.", "bg.", "bg.", "bg", "lbn")
_BUFFER_SIZES = "b.s."


class SlotForward:
    """The forward of one target over trees, as a function of tensors.

    The features are outputs of the forward (`output_hidden_states` of Transformers): compiled code has no place for
    hooks that come and go.

    Args:
        target: any decoder of Transformers.
        cache: of dynamic layers, filled with anything.
        feature_layers: the hidden states that sources read; none is the last layer's before the final norm.
        options: of `torch.compile`, where the caller has some.
    """

    is_invariant = False
    is_captured = False  # whatever the device and the options are
    kind = "steps"
    sizes: Sequence[str] = _SIZES
    _layer = SlotLayer

    def __init__(
        self,
        target: PreTrainedModel,
        cache: Cache,
        feature_layers: list[int],
        options: dict[str, Any] | None = None,
    ) -> None:
        self.target, self.feature_layers, self.options = target, feature_layers, options
        self.function = self._function(_run(target, cache, feature_layers, self._layer), _windows(target, cache))

    def _function(
        self, run: Callable[..., tuple[Tensor, ...]], windows: dict[str | None, int | None]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Of `SlotInputs` and buffers."""
        dtype = self.target.dtype

        def forward(
            tokens: Tensor,
            depths: Tensor,
            ancestors: Tensor,
            roots: Tensor,
            seen: Tensor,
            kept: Tensor,
            *buffers: Tensor,
        ) -> tuple[Tensor, ...]:
            slots, masks = _laid_out(depths, ancestors, roots, seen, windows, dtype)
            return run(
                tokens,
                slots,
                _by_planes(node_positions(roots[:, 1:], depths)),
                masks,
                buffers,
                kept,
                size=seen.shape[1],
            )

        return forward

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the target attend as the function wants it."""
        with use_gqa_attention(self.target):
            yield

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
        """Run it without compilation: the logits `[b, k, v]`, and the hidden states `[b, n, h]` of each feature layer.

        `buffers` are keys and values of each layer, `[b, kv heads, slots, hd]`; the tree's are written. `options` are
        of the target's forward.
        """
        with self.running():
            return self.function(*inputs, *buffers, **options)


class PackedForward(SlotForward):
    """Computes only nodes that count, of rows whose trees may differ in size: all matrices multiply one row of nodes,
    and attention alone has the rows apart.
    """

    kind = "packed steps"
    sizes = _PACKED_SIZES
    _layer = _PackedSlotLayer

    def _function(
        self, run: Callable[..., tuple[Tensor, ...]], windows: dict[str | None, int | None]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Of `PackedInputs` and buffers: the logits `[1, k, v]`, and the hidden states `[b, n, h]`."""
        dtype = self.target.dtype

        def forward(
            tokens: Tensor,
            depths: Tensor,
            ancestors: Tensor,
            roots: Tensor,
            seen: Tensor,
            packed: Tensor,
            kept: Tensor,
            *buffers: Tensor,
        ) -> tuple[Tensor, ...]:
            nodes = PackedNodes(packed, *tokens.shape)
            slots, masks = _laid_out(depths, ancestors, roots, seen, windows, dtype, nodes.are_computed)
            written = torch.cat([nodes.together(slots), nodes.together(_rows(slots))])
            own = _by_planes(nodes.together(node_positions(roots[:, 1:], depths)))
            options = {"size": seen.shape[1], "resps_packed": nodes}
            logits, *features = run(nodes.together(tokens), written, own, masks, buffers, kept, **options)
            return logits, *map(nodes.apart, features)

        return forward

    @staticmethod
    def serves(target: PreTrainedModel) -> bool:
        """Whether attention gets what a forward is told, in every layer."""
        attention = target.config.get_text_config()._attn_implementation
        return bool(target._supports_attention_backend) and attention in (STOCK, GROUPED)


class HybridForward(SlotForward):
    """Of a target with recurrent layers. Their states follow the `SlotInputs`, as `StateKinds` orders them, and do not
    change; what advances them follows the hidden states.
    """

    kind = "hybrid steps"

    def __init__(self, target: PreTrainedModel, cache: Cache, *args: Any) -> None:
        self.states = StateKinds(target, cache)
        self.sizes = (*_SIZES, *self.states.sizes)
        super().__init__(target, cache, *args)

    def _function(
        self, run: Callable[..., tuple[Tensor, ...]], windows: dict[str | None, int | None]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Of `SlotInputs`, states and buffers."""
        dtype, states = self.target.dtype, self.states
        count = len(states.sizes)
        attending = {kind: window for kind, window in windows.items() if kind not in RECURRENT_KINDS}

        def forward(
            tokens: Tensor,
            depths: Tensor,
            ancestors: Tensor,
            roots: Tensor,
            seen: Tensor,
            kept: Tensor,
            *parts: Tensor,
        ) -> tuple[Tensor, ...]:
            slots, laid_out = _laid_out(depths, ancestors, roots, seen, attending, dtype)
            masks: dict[str | None, Tensor | None] = dict.fromkeys(RECURRENT_KINDS)  # a node is no padding
            masks |= {"full_attention" if kind == "hybrid" else kind: mask for kind, mask in laid_out.items()}
            tree = WholeTree(depths, ancestors, states.by_layer(parts[:count]))
            positions = _by_planes(node_positions(roots[:, 1:], depths))
            options = {"size": seen.shape[1], "resps_tree": tree}
            outputs = run(tokens, slots, positions, masks, parts[count:], kept, **options)
            return *outputs, *states.noted(tree)

        return forward

    @contextmanager
    def running(self) -> Iterator[None]:
        """As `SlotForward.running`, and read trees whole."""
        with super().running(), TreeReaders(known_mixers(self.target).values()):
            yield


def forward_over_slots(target: PreTrainedModel, *, is_batch: bool) -> type[SlotForward]:
    """What runs steps of one row, or of several. A graph of an accelerator has a fixed number of nodes."""
    if is_recurrent(target):
        return HybridForward
    packs = is_batch and target.device.type == "cpu" and PackedForward.serves(target)
    return PackedForward if packs else SlotForward


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


def _laid_out(
    depths: Tensor,
    ancestors: Tensor,
    roots: Tensor,
    seen: Tensor,
    windows: dict[str | None, int | None],
    dtype: torch.dtype,
    are_computed: Tensor | None = None,
) -> tuple[Tensor, dict[str | None, Tensor]]:
    """The slots `[b, n]` of the nodes of `SlotInputs`, and the mask `[b, 1, n, slots]` of each kind of layers.

    Nodes that are not computed, where `are_computed` `[b, n]` is false, see nothing, which costs least.
    """
    root = roots[:, :1].long()  # some targets count positions in floats
    node_places = root + depths
    slots = root + torch.arange(depths.shape[1], device=depths.device)
    places = torch.arange(seen.shape[1], device=depths.device).expand_as(seen)
    index = slots[:, None].expand_as(ancestors)
    visible = (seen & (places < root))[:, None].expand(-1, depths.shape[1], -1).scatter(2, index, ancestors)
    visible = visible if are_computed is None else visible & are_computed[..., None]
    distance = node_places[..., None] - places.scatter(1, slots, node_places)[:, None]  # [b, n, slots]
    masks: dict[str | None, Tensor] = {}
    for kind, window in windows.items():
        shown = visible if window is None else visible & (distance < window)
        masks[kind] = torch.zeros_like(shown, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)[:, None]
    return slots, masks


def node_positions(roots: Tensor, depths: Tensor) -> Tensor:
    """Of nodes `[b, n]` below roots at positions `[b, planes]`: `[b, n, planes]`."""
    return roots[:, None] + depths[..., None]


def _by_planes(positions: Tensor) -> Tensor:
    """As targets take them: `[b, n, planes]` -> `[b, n]`, or `[planes, b, n]` of several planes."""
    planes = positions.permute(2, 0, 1)
    return planes[0] if planes.shape[0] == 1 else planes


def _windows(target: PreTrainedModel, cache: Cache) -> dict[str | None, int | None]:
    """Kind of layers -> its sliding window. Without kinds one mask serves all layers."""
    kinds: list[str | None] = getattr(target.config.get_text_config(), "layer_types", None) or [None]
    return {kind: window_of(cache, kinds.index(kind)) for kind in kinds}


def _run(
    target: PreTrainedModel, cache: Cache, feature_layers: list[int], kind: type[SlotLayer]
) -> Callable[..., tuple[Tensor, ...]]:
    """What runs the target over the first slots of buffers, all without a `size`, given masks for each kind of layers.

    Nodes that are `kept` get logits.
    """
    layers: list[Any] = cache.layers
    # A layer that shares another's keys has no buffers. The others are not kept: they hold the prompt.
    placeholders = [_without_entries(layer) if getattr(layer, "keys", None) is None else None for layer in layers]
    read = output_places(target, feature_layers)
    asked = hidden_states_asked(read)
    computes_some = cast(Any, target)._supports_logits_to_keep()

    def run(
        tokens: Tensor,
        slots: Tensor,
        positions: Tensor,
        masks: Mapping[str | None, Tensor | None],
        buffers: tuple[Tensor, ...],
        kept: Tensor | None = None,
        size: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        if kept is not None and computes_some:
            options["logits_to_keep"] = kept
        pairs, tree = iter(zip(buffers[::2], buffers[1::2], strict=True)), options.get("resps_tree")
        seen = buffers[0].shape[2] if size is None else size
        own: list[Any] = [kind(*next(pairs), slots, seen) if other is None else other for other in placeholders]
        held = Cache(layers=own) if tree is None else WholeTreeCache(own, tree)
        outputs: Any = target(
            input_ids=tokens,
            attention_mask=masks.get(None, masks),
            position_ids=positions,
            use_cache=True,
            return_dict=True,
            **{CACHE_KEYWORD: held},
            **asked,
            **options,
        )
        logits = outputs.logits if kept is None or computes_some else outputs.logits[:, kept]
        return (logits, *(outputs.hidden_states[place] for place in read))

    return run


class _StatesAlone:
    """Stands for a layer of a cache that has states and no keys."""

    is_compileable = supports_early_init = False


def _without_entries(layer: Any) -> Any:
    return _StatesAlone() if holds_state(layer) else layer


_CAPTURED_SIZES = (1, 2, 4, 8, 16, 32, 48, 64)


class SlotEngine(CompileEngine[PreTrainedModel]):
    """Compiles or captures the forwards of one target over slots, and keeps its buffers."""

    name = "the target's forward"
    duration = "A small model takes minutes on two cores."

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock=clock)
        self.buffers = SlotBuffers()
        self.lock = Lock()  # of the name of the target's attention
        # Of compiled code of the invariant mode: which was compared, and how it rounds a sample.
        self.checked: set[Hashable] = set()
        self.bits: dict[Hashable, bytes] = {}
        self.sample: list[int] = []  # tokens of a prompt: compiled and eager code differ more where they are no text
        self._pattern: tuple[Hashable, Cache] | None = None
        self._decoded_seconds = 0.0

    @torch.no_grad()
    def pattern(self, target: PreTrainedModel) -> Cache:
        """A dynamic cache that holds one token of the target: how its layers keep entries."""
        kind = target.dtype, target.device
        if self._pattern is None or self._pattern[0] != kind:
            cache = DynamicCache(config=target.config.get_text_config(decoder=True))
            token = torch.zeros(1, 1, dtype=torch.long, device=target.device)
            cast(Any, target)(input_ids=token, use_cache=True, **{CACHE_KEYWORD: cache})
            self._pattern = kind, cache
        return self._pattern[1]

    def forget(self) -> None:
        super().forget()
        self.checked.clear()
        self.bits.clear()

    @property
    def module(self) -> PreTrainedModel:
        return self.owner

    def fingerprint(self) -> WeightFingerprint:
        return WeightFingerprint(self.owner, self.owner.config.get_text_config()._attn_implementation)

    @property
    def pays(self) -> bool:
        """Whether compiled code is there, or decoding has taken as long as compiling will: the model lives on."""
        return self.is_compiled or self._decoded_seconds >= self.expected_seconds

    def is_stored(self, target: PreTrainedModel, feature_layers: list[int], *, is_batch: bool) -> bool:
        """Whether code for such steps lies ready, which another process has made."""
        name = _code_name(forward_over_slots(target, is_batch=is_batch).kind, is_batch, feature_layers)
        with self.borrow(target) as lent:
            return lent is not None and target.device.type == "cpu" and lent.packages.have(name)

    def note(self, seconds: float) -> None:
        """Note that a call has decoded for so long."""
        self._decoded_seconds += seconds

    def forward(
        self, forward: SlotForward, inputs: Sequence[Tensor], buffers: list[Tensor], row: int = 0
    ) -> tuple[Tensor, ...]:
        """Run a forward compiled, or as it is where that fails. `row` is that of the buffers, if they are of one."""
        outputs: tuple[Tensor, ...] | None = None
        if not self.is_broken:
            code = self._code_of(forward, inputs, row)
            outputs = self.run_packaged(code, inputs, buffers)  # asks for no attention by its name
            if outputs is None:
                with forward.running():
                    outputs = self.run(code, inputs, buffers)
        return forward(inputs, buffers) if outputs is None else outputs

    def _code_of(self, forward: SlotForward, inputs: Sequence[Tensor], row: int) -> Code:
        """The code that serves a single row or several, and the features of one head; a graph serves one row."""
        is_batch = len(inputs[0]) > 1

        def make() -> Code:
            fast: CompiledFunction | CapturedFunction
            if forward.is_captured or (inputs[0].device.type == "cuda" and forward.options is None):
                fast = CapturedFunction(forward.function)
            else:
                fixed = "." if is_batch else ".b"
                *dynamic, of_buffers = [
                    [place for place, size in enumerate(part) if size not in fixed]
                    for part in (*forward.sizes, _BUFFER_SIZES)
                ]
                name = _code_name(forward.kind, is_batch, forward.feature_layers)
                fast = CompiledFunction(
                    forward.function,
                    dynamic,
                    of_buffers,
                    forward.options,
                    packages=self.packages,
                    name=name,
                    is_invariant=forward.is_invariant,
                )
            return Code(forward.function, fast, _centred_logits, "logits", forward.target.dtype)

        return self.code((forward.kind, is_batch, row, *forward.feature_layers, str(forward.options)), make)


def _code_name(kind: str, is_batch: bool, feature_layers: list[int]) -> str:
    """Of a forward, in every process."""
    rows, layers = "a batch" if is_batch else "one row", ", ".join(map(str, feature_layers))
    return f"{kind}, {rows}, " + (f"features of layers {layers}" if layers else "no features")


LEAST_ROWS = 4  # rows of a forward on a CPU: oneDNN takes longer for one or two than for four (measured)


def padded_count(device: torch.device, count: int, rows: int = 1) -> int:
    """Nodes of a forward over `rows` trees of `count`, padding included: few sizes where each is captured by itself.

    On a CPU one code serves all sizes from two nodes on.
    """
    if device.type != "cuda":
        return max(count, 2, -(-LEAST_ROWS // rows))
    return next((size for size in _CAPTURED_SIZES if size >= count), -(-count // 64) * 64)


def _centred_logits(outputs: tuple[Tensor, ...]) -> Tensor:
    """Without what softmax ignores."""
    return outputs[0] - outputs[0].mean(dim=-1, keepdim=True)
