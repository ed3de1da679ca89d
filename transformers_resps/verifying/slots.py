"""Which slot holds which position of which row: plain numbers on the host, as one table for a forward.

Buffers of slots: keys and values whose place says nothing about their position in the text.

A tree's nodes are written to free slots. Accepted ones stay where they are, and the slots of the others are free
again, so that nothing moves and nothing is forgotten. The mask tells which slots a node sees.

The target's forward over a tree whose nodes go to slots, as one function of tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..compat import CACHE_KEYWORD
from ..compilation.compiled import is_of_this_mode
from .attention import use_gqa_attention
from .cache import replace_entries, window_of
from .forward import hidden_states_asked


HIDDEN = -1  # place of a slot that no node may see


class SlotTable:
    """The slots of a batch.

    Args:
        seen: of each row, whether its entries may be seen; padding may not. Entry i lies in slot i.

    Attributes:
        rows: of each row, the slots of its entries in the order of the text.
    """

    def __init__(self, seen: list[list[bool]]) -> None:
        self.rows = [list(range(len(row))) for row in seen]
        self._ends = [len(row) for row in seen]  # slots from there on were never used
        self._free: list[list[int]] = [[] for _ in seen]  # before that
        self._offered: list[list[int]] = []
        self._places = torch.full((len(seen), 2 * max(self._ends)), HIDDEN)  # [b, slots]
        for table, row in zip(self._places, seen, strict=True):
            table[: len(row)] = torch.where(torch.tensor(row), torch.arange(len(row)), HIDDEN)

    @property
    def lengths(self) -> list[int]:
        """Entries of each row, which is the place of its next one."""
        return [len(row) for row in self.rows]

    @property
    def size(self) -> int:
        """Slots that were used or are offered."""
        return max([*self._ends, *(slots[-1] + 1 for slots in self._offered)])

    def offer(self, count: int) -> list[list[int]]:
        """The slots for the nodes of the coming forward, `count` of each row, ascending.

        `keep` or another `offer` comes next.
        """
        self._offered = []
        for free, end in zip(self._free, self._ends, strict=True):
            missing = max(count - len(free), 0)
            self._offered.append([*free[:count], *range(end, end + missing)])
        self._reserve(self.size)
        return self._offered

    def places(self, size: int) -> Tensor:
        """`[b, size]` the place in its row's text of the entry in each slot; `HIDDEN` where none may be seen."""
        self._reserve(size)
        return self._places[:, :size].contiguous()

    def _reserve(self, size: int) -> None:
        missing = size - self._places.shape[1]
        if missing > 0:
            more = self._places.new_full((len(self._places), missing + size), HIDDEN)
            self._places = torch.cat([self._places, more], dim=1)

    def keep(self, paths: list[list[int]]) -> None:
        """Keep the nodes of each row's path, the root first, of the newest forward."""
        for row, path in enumerate(paths):
            offered, kept = self._offered[row], set(path)
            slots = [offered[node] for node in path]
            start = len(self.rows[row])
            self._places[row, slots] = torch.arange(start, start + len(path))
            self.rows[row] += slots
            self._ends[row] = max(self._ends[row], offered[-1] + 1)
            spare = self._free[row][len(offered) :]
            self._free[row] = [*(slot for node, slot in enumerate(offered) if node not in kept), *spare]
        self._offered = []

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but these; a row may be asked for twice."""
        self.rows, self._free = ([list(part[row]) for row in rows] for part in (self.rows, self._free))
        self._ends, self._offered = [self._ends[row] for row in rows], []
        self._places = self._places[list(rows)]


class SlotLayer(CacheLayerMixin):
    """One layer's buffers during one forward.

    Args:
        keys: `[slots, b, kv heads, hd]`; a window of the buffers.
        values: like `keys`; `hd` may differ.
        written: `[b, n]` the slots that the forward writes.
    """

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, written: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers = keys, values
        rows = torch.arange(written.shape[0], device=written.device)[:, None]
        self._places = written, rows.expand_as(written)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[b, kv heads, n, hd]` entries; returns all slots, `[b, kv heads, slots, hd]`."""
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.index_put_(self._places, states.transpose(1, 2))
        keys, values = (buffer.permute(1, 2, 0, 3) for buffer in self._buffers)
        return keys, values

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The buffers are there."""

    def get_seq_length(self) -> int:
        """Zero: positions are passed to the forward, and so is the mask."""
        return 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """The slots, from 0 on."""
        return self._buffers[0].shape[0], 0

    def get_max_length(self) -> int:
        """The slots."""
        return self._buffers[0].shape[0]

    get_max_cache_shape = get_max_length


class SlotBuffers:
    """The buffers of all layers of a target, as large as any text needed so far; kept from call to call.

    Windows of them are kept: compiled code meets the same tensors again.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []  # keys and values of the first layer, of the second, and so on
        self._windows: dict[int, list[Tensor]] = {}

    @property
    def size(self) -> int:
        """Slots."""
        return self._parts[0].shape[0] if self._parts else 0

    def fill(self, layers: list[Any], length: int, rows: int, size: int) -> None:
        """Take over the entries of filled dynamic layers, each at the slot of its place in the text.

        Args:
            layers: with entries `[b, kv heads, s, hd]`; a sliding one has the last ones of the text only.
            length: of the text.
            rows: of the buffers, at least b; copies of the batch's last row fill those that are too many.
            size: slots that are needed.
        """
        parts = [part for layer in layers for part in (layer.keys, layer.values)]
        kinds = [(rows, part.shape[1], part.shape[3], part.dtype, part.device) for part in parts]
        known = [(*part.shape[1:], part.dtype, part.device) for part in self._parts]
        if self.size < size or known != kinds or not is_of_this_mode(self._parts[0]):
            self._own([part.new_zeros(size, rows, part.shape[1], part.shape[3]) for part in parts])
        for buffer, part in zip(self._parts, parts, strict=True):
            entries = part.permute(2, 0, 1, 3)
            place = buffer[length - len(entries) : length]
            place[:, : entries.shape[1]] = entries
            place[:, entries.shape[1] :] = entries[:, -1:]

    def grow(self, size: int) -> None:
        """Move to buffers of `size` slots."""
        grown = [part.new_zeros(size, *part.shape[1:]) for part in self._parts]
        for buffer, part in zip(grown, self._parts, strict=True):
            buffer[: len(part)] = part
        self._own(grown)

    def keep_rows(self, rows: list[int]) -> None:
        """Forget all rows but these; as many rows as there are stay where they are."""
        order, kept = torch.tensor(rows), list[Tensor]()
        for part in self._parts:
            order = order.to(part.device)  # once, unless layers lie on several devices
            kept.append(part.index_select(1, order))
        if kept and kept[0].shape == self._parts[0].shape:
            for part, chosen in zip(self._parts, kept, strict=True):
                part.copy_(chosen)
        else:
            self._own(kept)

    def window(self, size: int) -> list[Tensor]:
        """The first `size` slots: keys and values `[slots, b, kv heads, hd]` of the first layer, the second, ..."""
        if size not in self._windows:
            self._windows[size] = [_front(part, size) for part in self._parts]
        return self._windows[size]

    def entries(self, slots: list[list[int]]) -> list[Tensor]:
        """`[b, kv heads, s, hd]` of each row's `slots`, in their order; keys and values of each layer in turn."""
        places = torch.tensor(slots, device=self._parts[0].device)
        order = torch.arange(len(slots), device=places.device)[:, None]
        return [part[places, order].transpose(1, 2) for part in self._parts]

    def _own(self, parts: list[Tensor]) -> None:
        self._parts, self._windows = parts, {}


def _front(part: Tensor, size: int) -> Tensor:
    """The first `size` slots of a contiguous buffer; where code is compiled, as a tensor that is no view."""
    if part.device.type != "cpu":
        return part[:size]
    storage, shape = part.untyped_storage(), (size, *part.shape[1:])
    return part.new_empty(0).set_(storage, 0, shape, part.stride())  # type: ignore[call-overload, no-any-return]


def filled_layers(cache: Cache) -> list[Any]:
    """The layers that hold entries; one that shares another's keys has none."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if getattr(layer, "keys", None) is not None]


def give_back(parts: list[Tensor], cache: Cache, length: int) -> None:
    """Let the dynamic layers of a cache hold entries `[b, kv heads, s, hd]` of `length` positions; keys and values in
    turn.
    """
    for layer, keys, values in zip(filled_layers(cache), parts[::2], parts[1::2], strict=True):
        kept = min(length, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else length
        replace_entries(layer, [part[:, :, length - kept :].contiguous() for part in (keys, values)], length)


class SlotInputs(NamedTuple):
    """A tree, and where it goes.

    Attributes:
        tokens: `[b, n]`.
        depths: `[b, n]` below the root.
        ancestors: `[b, n, n]` bool, see `DraftTree`.
        slots: `[b, n]` that the nodes are written to.
        places: `[b, slots]` in the row's text of the entry in each slot; `HIDDEN` where none may be seen.
        roots: `[b, 2]` the root's place in the text, and its position.
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    slots: Tensor
    places: Tensor
    roots: Tensor


class SlotLayout:
    """How a target's layers use a cache.

    Args:
        config: the target's.
        cache: filled, of dynamic layers.
    """

    def __init__(self, config: PretrainedConfig, cache: Cache) -> None:
        layers: list[Any] = cache.layers
        self._has_entries = [getattr(layer, "keys", None) is not None for layer in layers]
        self._placeholders = [layer for layer, own in zip(layers, self._has_entries, strict=True) if not own]
        kinds: list[str] | None = getattr(config.get_text_config(), "layer_types", None)
        # layer type -> its sliding window; without types one mask serves all layers
        self.windows: dict[str | None, int | None] = {}
        if kinds is None:
            self.windows[None] = window_of(cache, 0)
        else:
            self.windows |= {kind: window_of(cache, kinds.index(kind)) for kind in kinds}

    def cache(self, buffers: tuple[Tensor, ...], written: Tensor) -> Cache:
        """The cache of one forward that writes the slots `[b, n]`."""
        pairs, others = iter(zip(buffers[::2], buffers[1::2], strict=True)), iter(self._placeholders)
        return Cache(layers=[SlotLayer(*next(pairs), written) if own else next(others) for own in self._has_entries])


class SlotForward:
    """The forward of one target over trees, as a function of tensors.

    The features are outputs of the forward (`output_hidden_states` of Transformers): compiled code has no place for
    hooks that come and go.

    Args:
        target: any decoder of Transformers.
        layout: of its cache.
        feature_layers: the hidden states that a head reads, below the last.
        options: of `torch.compile`, where the caller has some.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        layout: SlotLayout,
        feature_layers: list[int],
        options: dict[str, Any] | None = None,
    ) -> None:
        self.target, self.feature_layers, self.options = target, feature_layers, options
        self.function = _function(target, layout, feature_layers)

    def __call__(self, inputs: SlotInputs, buffers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run it without compilation: the logits `[b, n, v]`, and the hidden states `[b, n, h]` of each feature layer.

        Args:
            inputs: what the tree is, and where it goes.
            buffers: keys and values of each layer, `[slots, b, kv heads, hd]`; the tree's are written.
        """
        with use_gqa_attention(self.target):
            return self.function(*inputs, *buffers)


def _function(
    target: PreTrainedModel, layout: SlotLayout, feature_layers: list[int]
) -> Callable[..., tuple[Tensor, ...]]:
    asked = hidden_states_asked(feature_layers)
    dtype = target.dtype

    def forward(
        tokens: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        slots: Tensor,
        places: Tensor,
        roots: Tensor,
        *buffers: Tensor,
    ) -> tuple[Tensor, ...]:
        node_places = roots[:, :1] + depths
        index = slots[:, None].expand_as(ancestors)
        visible = (places != HIDDEN)[:, None].expand(-1, tokens.shape[1], -1).scatter(2, index, ancestors)
        distance = node_places[..., None] - places.scatter(1, slots, node_places)[:, None]  # [b, n, slots]
        masks: dict[str | None, Tensor] = {}
        for kind, window in layout.windows.items():
            seen = visible if window is None else visible & (distance < window)
            masks[kind] = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
        outputs: Any = target(
            input_ids=tokens,
            attention_mask=masks.get(None, masks),
            position_ids=roots[:, 1:] + depths,
            use_cache=True,
            return_dict=True,
            **{CACHE_KEYWORD: layout.cache(buffers, slots)},
            **asked,
        )
        return (outputs.logits, *(outputs.hidden_states[layer] for layer in feature_layers))

    return forward
