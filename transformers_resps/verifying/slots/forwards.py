"""The forward of a target over slots, as functions of tensors that can be compiled or captured: it sees few sizes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ...compat import CACHE_KEYWORD
from ..attention import GROUPED, STOCK, PackedNodes, use_gqa_attention
from ..cache import holds_state, window_of
from ..forward import hidden_states_asked, output_places
from ..hybrids import RECURRENT_KINDS, StateKinds, WholeTree, WholeTreeCache, is_recurrent, known_mixers, reading_trees
from .buffers import SlotLayer, _rows


class _PackedSlotLayer(SlotLayer):
    """Of `PackedInputs`: `written` are the slots and the rows of the nodes, `[2, r]`."""

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        slots, rows = self._written
        buffer[rows, :, slots] = states[0].transpose(0, 1)


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


# Sizes of the inputs and of the buffers: those with a letter change from call to call, b only in batches.
_SIZES = ("bn", "bn", "bnn", "b.", "bs", "k")
_PACKED_SIZES = ("bn", "bn", "bnn", "b.", "bs", "r", "k")


class SlotForward:
    """The forward of one target over trees, as a function of tensors.

    The features are outputs of the forward (`output_hidden_states` of Transformers): compiled code has no place for
    hooks that come and go.

    Args:
        target: any decoder of Transformers.
        cache: of dynamic layers, filled with anything.
        feature_layers: whose hidden states it gives; none is the last layer's before the final norm. `None` gives all,
            so that one code serves every head and none.
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
        feature_layers: list[int] | None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.target, self.feature_layers, self.options = target, feature_layers, options
        self._last = target.config.get_text_config().num_hidden_layers
        self._places = list(range(self._last + 1) if feature_layers is None else output_places(target, feature_layers))
        self._run = _run(target, cache, self._places, self._layer)
        self._windows = _windows(target, cache)

    def function(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Of `SlotInputs` and buffers."""
        inputs, buffers = SlotInputs(*given[: len(SlotInputs._fields)]), given[len(SlotInputs._fields) :]
        slots, masks = _laid_out(inputs, self._windows, self.target.dtype)
        positions = _by_planes(node_positions(inputs.roots[:, 1:], inputs.depths))
        return self._run(inputs.tokens, slots, positions, masks, buffers, inputs.kept, size=inputs.seen.shape[1])

    def features(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], layers: list[int]) -> dict[int, Tensor]:
        """Of what the function gave for these inputs, the hidden states `[b, n, h]` of some layers."""
        return {layer: outputs[1 + self._places.index(min(layer, self._last))] for layer in layers}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the target attend as the function wants it."""
        with use_gqa_attention(self.target):
            yield

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run it without compilation: the logits `[b, k, v]`, and the hidden states `[b, n, h]` of each feature layer.

        `buffers` are keys and values of each layer, `[b, kv heads, slots, hd]`; the tree's are written.
        """
        with self.running():
            return self.function(*inputs, *buffers)


class PackedForward(SlotForward):
    """Computes only nodes that count, of rows whose trees may differ in size: all matrices multiply one row of nodes,
    and attention alone has the rows apart.
    """

    kind = "packed steps"
    sizes = _PACKED_SIZES
    _layer = _PackedSlotLayer

    def function(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Of `PackedInputs` and buffers: the logits `[1, k, v]`, and the hidden states `[1, r, h]`."""
        inputs, buffers = PackedInputs(*given[: len(PackedInputs._fields)]), given[len(PackedInputs._fields) :]
        nodes = PackedNodes(inputs.packed, *inputs.tokens.shape)
        slots, masks = _laid_out(inputs, self._windows, self.target.dtype, nodes.are_computed)
        written = torch.cat([nodes.together(slots), nodes.together(_rows(slots))])
        positions = _by_planes(nodes.together(node_positions(inputs.roots[:, 1:], inputs.depths)))
        options = {"size": inputs.seen.shape[1], "resps_packed": nodes}
        tokens = nodes.together(inputs.tokens)
        return self._run(tokens, written, positions, masks, buffers, inputs.kept, **options)

    def features(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], layers: list[int]) -> dict[int, Tensor]:
        given = PackedInputs(*inputs)
        nodes = PackedNodes(given.packed, *given.tokens.shape)
        return {layer: nodes.apart(states) for layer, states in super().features(outputs, inputs, layers).items()}

    @staticmethod
    def serves(target: PreTrainedModel) -> bool:
        """Whether attention gets what a forward is told, in every layer."""
        attention = target.config.get_text_config()._attn_implementation
        return bool(target._supports_attention_backend) and attention in (STOCK, GROUPED)


class HybridForward(SlotForward):
    """Of a target with recurrent layers. Their states follow the `SlotInputs`, as `StateKinds` orders them, and do not
    change; what advances them follows the hidden states, see `noted`.
    """

    kind = "hybrid steps"

    def __init__(self, target: PreTrainedModel, cache: Cache, *args: Any) -> None:
        self.states = StateKinds(target, cache)
        self.sizes = (*_SIZES, *self.states.sizes)
        super().__init__(target, cache, *args)

    def function(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Of `SlotInputs`, states and buffers."""
        inputs, parts = SlotInputs(*given[: len(SlotInputs._fields)]), given[len(SlotInputs._fields) :]
        count = len(self.states.sizes)
        attending = {kind: window for kind, window in self._windows.items() if kind not in RECURRENT_KINDS}
        slots, laid_out = _laid_out(inputs, attending, self.target.dtype)
        masks: dict[str | None, Tensor | None] = dict.fromkeys(RECURRENT_KINDS)  # a node is no padding
        masks |= {"full_attention" if kind == "hybrid" else kind: mask for kind, mask in laid_out.items()}
        tree = WholeTree(inputs.depths, inputs.ancestors, self.states.by_layer(parts[:count]))
        positions = _by_planes(node_positions(inputs.roots[:, 1:], inputs.depths))
        options = {"size": inputs.seen.shape[1], "resps_tree": tree}
        outputs = self._run(inputs.tokens, slots, positions, masks, parts[count:], inputs.kept, **options)
        return *outputs, *self.states.noted(tree)

    def noted(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of what the function gave, what advances the states."""
        return outputs[1 + len(self._places) :]

    @contextmanager
    def running(self) -> Iterator[None]:
        """As `SlotForward.running`, and read trees whole."""
        with super().running(), reading_trees(known_mixers(self.target).values()):
            yield


def forward_over_slots(target: PreTrainedModel, *, is_batch: bool) -> type[SlotForward]:
    """What runs steps of one row, or of several. A graph of an accelerator has a fixed number of nodes."""
    if is_recurrent(target):
        return HybridForward
    packs = is_batch and target.device.type == "cpu" and PackedForward.serves(target)
    return PackedForward if packs else SlotForward


def _laid_out(
    inputs: SlotInputs | PackedInputs,
    windows: dict[str | None, int | None],
    dtype: torch.dtype,
    are_computed: Tensor | None = None,
) -> tuple[Tensor, dict[str | None, Tensor]]:
    """The slots `[b, n]` of the nodes, and the mask `[b, 1, n, slots]` of each kind of layers.

    Nodes that are not computed, where `are_computed` `[b, n]` is false, see nothing, which costs least.
    """
    _, depths, ancestors, roots, seen, *_ = inputs
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
    target: PreTrainedModel, cache: Cache, read: list[int], kind: type[SlotLayer]
) -> Callable[..., tuple[Tensor, ...]]:
    """What runs the target over the first slots of buffers, all without a `size`, given masks for each kind of layers.

    The hidden states at the places `read` follow the logits, which nodes get that are `kept`.
    """
    layers: list[Any] = cache.layers
    # A layer that shares another's keys has no buffers. The others are not kept: they hold the prompt.
    placeholders = [_without_entries(layer) if getattr(layer, "keys", None) is None else None for layer in layers]
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
