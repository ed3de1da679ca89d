"""A tree's nodes in free slots of buffers that live from call to call: nothing moves, and the forward sees few sizes.

Accepted nodes stay where they were written, and the slots of the others are free again. The mask tells which slots a
node sees.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..compat import CACHE_KEYWORD
from ..compilation.captured import CapturedFunction
from ..compilation.compiled import CompiledFunction
from ..compilation.engine import Code, CompileEngine, WeightFingerprint, is_of_this_mode
from .attention import use_gqa_attention
from .cache import replace_entries, window_of
from .forward import hidden_states_asked, output_places
from .rows import HIDDEN


class SlotLayer(CacheLayerMixin):
    """One layer's windows of the buffers, `[slots, b, kv heads, hd]`, in a forward that writes the slots `[b, n]`."""

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

    def entries(self, slots: list[list[int]], first: int = 0) -> list[Tensor]:
        """`[b, kv heads, s, hd]` of each row's `slots`, in their order; keys and values of each layer in turn.

        `slots` are those of the row `first` and the next ones.
        """
        places = torch.tensor(slots, device=self._parts[0].device)
        order = torch.arange(first, first + len(slots), device=places.device)[:, None]
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
        roots: `[b, 1 + planes]` the root's place in the text, and its positions.
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    slots: Tensor
    places: Tensor
    roots: Tensor


class SlotForward:
    """The forward of one target over trees, as a function of tensors.

    The features are outputs of the forward (`output_hidden_states` of Transformers): compiled code has no place for
    hooks that come and go.

    Args:
        target: any decoder of Transformers.
        cache: of dynamic layers, filled with the prompt.
        feature_layers: the hidden states that sources read; none is the last layer's before the final norm.
        options: of `torch.compile`, where the caller has some.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        cache: Cache,
        feature_layers: list[int],
        options: dict[str, Any] | None = None,
    ) -> None:
        self.target, self.feature_layers, self.options = target, feature_layers, options
        self.function = _function(target, cache, feature_layers)

    def __call__(self, inputs: SlotInputs, buffers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run it without compilation: the logits `[b, n, v]`, and the hidden states `[b, n, h]` of each feature layer.

        `buffers` are keys and values of each layer, `[slots, b, kv heads, hd]`; the tree's are written.
        """
        with use_gqa_attention(self.target):
            return self.function(*inputs, *buffers)


def _positions(roots: Tensor, depths: Tensor) -> Tensor:
    """Of nodes `[b, n]` below roots `[b, planes]`: `[b, n]`, or `[planes, b, n]` of several planes."""
    return roots + depths if roots.shape[1] == 1 else roots.t()[..., None] + depths


def _function(target: PreTrainedModel, cache: Cache, feature_layers: list[int]) -> Callable[..., tuple[Tensor, ...]]:
    layers: list[Any] = cache.layers
    # A layer that shares another's keys has no buffers. The others are not kept: they hold the prompt.
    placeholders = [layer if getattr(layer, "keys", None) is None else None for layer in layers]
    kinds: list[str | None] = getattr(target.config.get_text_config(), "layer_types", None) or [None]
    windows = {kind: window_of(cache, kinds.index(kind)) for kind in kinds}  # without types one mask serves all layers
    read, dtype = output_places(target, feature_layers), target.dtype
    asked = hidden_states_asked(read)

    def forward(
        tokens: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        slots: Tensor,
        places: Tensor,
        roots: Tensor,
        *buffers: Tensor,
    ) -> tuple[Tensor, ...]:
        pairs = iter(zip(buffers[::2], buffers[1::2], strict=True))
        held = Cache(layers=[SlotLayer(*next(pairs), slots) if other is None else other for other in placeholders])
        node_places = roots[:, :1].long() + depths  # some targets count positions in floats
        index = slots[:, None].expand_as(ancestors)
        visible = (places != HIDDEN)[:, None].expand(-1, tokens.shape[1], -1).scatter(2, index, ancestors)
        distance = node_places[..., None] - places.scatter(1, slots, node_places)[:, None]  # [b, n, slots]
        masks: dict[str | None, Tensor] = {}
        for kind, window in windows.items():
            seen = visible if window is None else visible & (distance < window)
            masks[kind] = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
        outputs: Any = target(
            input_ids=tokens,
            attention_mask=masks.get(None, masks),
            position_ids=_positions(roots[:, 1:], depths),
            use_cache=True,
            return_dict=True,
            **{CACHE_KEYWORD: held},
            **asked,
        )
        return (outputs.logits, *(outputs.hidden_states[place] for place in read))

    return forward


# The dimensions of `SlotInputs` and of the buffers that change, with several rows.
_SIZES = ((0, 1), (0, 1), (0, 1, 2), (0, 1), (0, 1), (0,))
_BUFFER_SIZES = (0, 1)
_CAPTURED_SIZES = (1, 2, 4, 8, 16, 32, 48, 64)


class SlotEngine(CompileEngine[PreTrainedModel]):
    """Compiles or captures the forwards of one target over slots, and keeps its buffers."""

    name = "the target's forward"
    duration = "A small model takes up to two minutes on two cores."

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock=clock)
        self.buffers = SlotBuffers()
        self._decoded_seconds = 0.0

    def fingerprint(self) -> WeightFingerprint:
        return WeightFingerprint(self.owner, self.owner.config.get_text_config()._attn_implementation)

    @property
    def pays(self) -> bool:
        """Whether compiled code is there, or decoding has taken as long as compiling will: the model lives on."""
        return self.is_compiled or self._decoded_seconds >= self.expected_seconds

    def note(self, seconds: float) -> None:
        """Note that a call has decoded for so long."""
        self._decoded_seconds += seconds

    def forward(self, forward: SlotForward, inputs: SlotInputs, buffers: list[Tensor]) -> tuple[Tensor, ...]:
        """Run a forward compiled, or as it is where that fails."""
        outputs: tuple[Tensor, ...] | None = None
        if not self.is_broken:
            code = self._code_of(forward, inputs)
            with use_gqa_attention(forward.target):
                outputs = self.run(code, inputs, buffers)
        return forward(inputs, buffers) if outputs is None else outputs

    def _code_of(self, forward: SlotForward, inputs: SlotInputs) -> Code:
        """The code that serves a single row or several, and the features of one head."""
        is_batch = len(inputs.tokens) > 1

        def make() -> Code:
            fast: CompiledFunction | CapturedFunction
            if inputs.tokens.device.type == "cuda" and forward.options is None:
                fast = CapturedFunction(forward.function)
            elif is_batch:
                fast = CompiledFunction(forward.function, _SIZES, _BUFFER_SIZES, forward.options)
            else:  # one row stays one row
                dynamic = [tuple(size for size in sizes if size) for sizes in _SIZES]
                fast = CompiledFunction(forward.function, dynamic, _BUFFER_SIZES[:1], forward.options)
            return Code(forward.function, fast, _centred_logits, "logits", forward.target.dtype)

        return self.code((is_batch, *forward.feature_layers, str(forward.options)), make)


def padded_count(device: torch.device, count: int) -> int:
    """Nodes of a forward over a tree of `count`, padding included: few sizes where each is captured by itself.

    On a CPU one code serves all sizes from two nodes on, and a second node costs nothing.
    """
    if device.type != "cuda":
        return max(count, 2)
    return next((size for size in _CAPTURED_SIZES if size >= count), -(-count // 64) * 64)


def _centred_logits(outputs: tuple[Tensor, ...]) -> Tensor:
    """Without what softmax ignores."""
    return outputs[0] - outputs[0].mean(dim=-1, keepdim=True)
