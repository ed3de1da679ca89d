"""A target's forward over static buffers, as a function of tensors that can be compiled or captured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ...compat import CACHE_KEYWORD
from ..attention import GROUPED, STOCK, PackedNodes, use_gqa_attention
from ..cache import holds_state
from ..forward import hidden_states_asked, output_places
from ..hybrids import StateKinds, WholeTree, WholeTreeCache, is_recurrent, known_mixers, reading_trees
from ..masks import AttentionPattern, additive, attention_patterns
from .buffers import SlotLayer, row_index


class _PackedSlotLayer(SlotLayer):
    """A `SlotLayer` for packed nodes: `written` `[2, r]` holds the slots and batch rows of the r packed nodes."""

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        slots, rows = self._written
        buffer[rows, :, slots] = states[0].transpose(0, 1)


class SlotInputs(NamedTuple):
    """The inputs of a forward over a tree or a part of a prompt. Node i is cached i slots after the root."""

    tokens: Tensor  # [b, n]
    depths: Tensor  # [b, n], below the root
    ancestors: Tensor  # [b, n, n] bool, see `DraftTree`
    roots: Tensor  # [b, 1 + planes], the root's index in the text, then its position ids
    seen: Tensor  # [b, slots], false where a slot holds padding
    kept: Tensor  # [k], the nodes whose logits are computed, in this order; indices in `packed` if there is one
    packed: Tensor | None = None  # [r], the only nodes to compute, among the `b * n` of all rows; `None` for all


PACKED_STEPS = "packed steps"  # `kind` of forwards over packed nodes
# For each input a character per dimension: a dot if its size is fixed, else a letter (b is fixed except in batches).
_SIZES = ("bn", "bn", "bnn", "b.", "bs", "k")


class SlotForward:
    """The forward of one target over trees, as a function of tensors.

    The hidden states of `feature_layers` come from `output_hidden_states`, because hooks cannot be added to compiled
    code; the last layer's states before the final norm are not available. With `feature_layers=None` the forward
    returns all layers' states, so that the same code serves every head. `cache` is any dynamic cache of the target,
    whose layers are inspected. `options` are for `torch.compile`. Compiled code rounds weights to `bits` bits.
    """

    is_invariant = False
    is_captured = False  # whether the forward is captured as a graph on every device, even if `options` are given
    kind = "steps"
    sizes: Sequence[str] = _SIZES
    layer = SlotLayer

    def __init__(
        self,
        target: PreTrainedModel,
        cache: Cache,
        feature_layers: list[int] | None,
        options: dict[str, Any] | None = None,
        *,
        packs_rows: bool = False,
        bits: int = 16,
    ) -> None:
        self.target, self.feature_layers, self.options, self.bits = target, feature_layers, options, bits
        if packs_rows:
            self.kind, self.sizes, self.layer = PACKED_STEPS, (*_SIZES, "r"), _PackedSlotLayer
        if bits < 16:
            self.kind = f"steps of {bits} bits"
        self._last = target.config.get_text_config().num_hidden_layers
        self.places = list(range(self._last + 1) if feature_layers is None else output_places(target, feature_layers))
        self.run = _run(target, cache, self.places, self.layer)
        self.patterns = attention_patterns(target.config, cache)

    def function(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Run the target over `given`, the tensors of inputs and buffers; return logits, then hidden states."""
        inputs, buffers = SlotInputs(*given[: len(self.sizes)]), given[len(self.sizes) :]
        nodes = None if inputs.packed is None else PackedNodes(inputs.packed, *inputs.tokens.shape)
        are_computed = None if nodes is None else nodes.are_computed
        slots, masks = _laid_out(inputs, self.patterns, self.target.dtype, are_computed)
        tokens, positions = inputs.tokens, node_positions(inputs.roots[:, 1:], inputs.depths)
        options: dict[str, Any] = {"size": inputs.seen.shape[1]}
        if nodes is not None:
            slots = torch.cat([nodes.together(slots), nodes.together(row_index(slots))])
            tokens, positions, options["resps_packed"] = nodes.together(tokens), nodes.together(positions), nodes
        return self.run(tokens, slots, by_planes(positions), masks, buffers, inputs.kept, **options)

    def features(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], layers: list[int]) -> dict[int, Tensor]:
        """Map each of `layers` to its hidden states `[b, n, h]`, from the `outputs` of `function` for `inputs`."""
        caught = {layer: outputs[1 + self.places.index(min(layer, self._last))] for layer in layers}
        if self.kind != PACKED_STEPS:
            return caught
        nodes = PackedNodes(inputs[-1], *inputs[0].shape)
        return {layer: nodes.apart(states) for layer, states in caught.items()}

    def noted(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pick from the outputs of `function` the tensors that later advance the states of recurrent layers."""
        return outputs[1 + len(self.places) :]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Set the target's attention implementation to the one that `function` needs, inside a `with` block."""
        with use_gqa_attention(self.target):
            yield

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run `function` eagerly; return logits `[b, k, v]`, then each feature layer's hidden states `[b, n, h]`.

        For packed nodes they are `[1, k, v]` and `[1, r, h]`. The nodes' keys and values are written to `buffers`:
        each layer's keys, then values, `[b, kv heads, slots, hd]`.
        """
        with self.running():
            return self.function(*inputs, *buffers)


class HybridForward(SlotForward):
    """The forward of a target with recurrent layers.

    `function` also gets these layers' states, stacked by `StateKinds.stacked`, and leaves them unchanged. After the
    hidden states it returns tensors from which `StateKinds.advance` later updates these states.
    """

    kind = "hybrid steps"

    def __init__(self, target: PreTrainedModel, cache: Cache, *args: Any) -> None:
        self.states = StateKinds(target, cache)
        self.sizes = (*_SIZES, *self.states.sizes)
        super().__init__(target, cache, *args)

    def function(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Run the target over `given`: tensors of `SlotInputs`, recurrent states, buffers of keys and values.

        Returns logits, hidden states, and the tensors for `StateKinds.advance`.
        """
        inputs, parts = SlotInputs(*given[: len(_SIZES)]), given[len(_SIZES) :]
        count = len(self.states.sizes)
        slots, masks = _laid_out(inputs, self.patterns, self.target.dtype)
        tree = WholeTree(inputs.depths, inputs.ancestors, self.states.by_layer(parts[:count]))
        positions = by_planes(node_positions(inputs.roots[:, 1:], inputs.depths))
        options = {"size": inputs.seen.shape[1], "resps_tree": tree}
        outputs = self.run(inputs.tokens, slots, positions, masks, parts[count:], inputs.kept, **options)
        return *outputs, *self.states.noted(tree)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Set the attention, and replace the recurrent layers' scans (`reading_trees`), inside a `with` block."""
        with super().running(), reading_trees(known_mixers(self.target).values()):
            yield


def packs_rows(target: PreTrainedModel, *, is_batch: bool) -> bool:
    """Whether steps skip a batch's padding: its real nodes are packed in one row, which only attention unpacks."""
    attention = target.config.get_text_config()._attn_implementation
    # whether layers pass the forward's keywords on to attention
    is_told = bool(target._supports_attention_backend) and attention in (STOCK, GROUPED)
    # not in captured graphs, whose number of nodes is fixed
    return is_batch and is_told and target.device.type == "cpu" and not is_recurrent(target)


def steps_kind(target: PreTrainedModel, *, is_batch: bool) -> str:
    """Return the `kind` of the `SlotForward` that runs the target's steps."""
    if is_recurrent(target):
        return HybridForward.kind
    return PACKED_STEPS if packs_rows(target, is_batch=is_batch) else SlotForward.kind


def _laid_out(
    inputs: SlotInputs,
    patterns: Mapping[str | None, AttentionPattern | None],
    dtype: torch.dtype,
    are_computed: Tensor | None = None,
) -> tuple[Tensor, dict[str | None, Tensor | None]]:
    """Return the nodes' slots `[b, n]`, and a dict from layer type to its additive mask `[b, 1, n, slots]`."""
    _, depths, ancestors, roots, seen, *_ = inputs
    root = roots[:, :1].long()  # some targets count positions in floats
    node_places = root + depths
    slots = root + torch.arange(depths.shape[1], device=depths.device)
    places = torch.arange(seen.shape[1], device=depths.device).expand_as(seen)
    index = slots[:, None].expand_as(ancestors)
    visible = (seen & (places < root))[:, None].expand(-1, depths.shape[1], -1).scatter(2, index, ancestors)
    if are_computed is not None:  # the other nodes attend to nothing, which is cheapest
        visible = visible & are_computed[..., None]
    queries, keys = node_places[..., None], places.scatter(1, slots, node_places)[:, None]
    masks = {
        name: None if pattern is None else additive(pattern.mask(queries, keys, visible), dtype)[:, None]
        for name, pattern in patterns.items()
    }
    return slots, masks


def node_positions(roots: Tensor, depths: Tensor) -> Tensor:
    """Add `depths` `[b, n]` of nodes to position ids of roots `[b, planes]`: `[b, n, planes]`, several in M-RoPE."""
    return roots[:, None] + depths[..., None]


def by_planes(positions: Tensor) -> Tensor:
    """Rearrange position ids for the target: `[b, n, planes]` -> `[b, n]`, or `[planes, b, n]` with M-RoPE."""
    planes = positions.permute(2, 0, 1)
    return planes[0] if planes.shape[0] == 1 else planes


def _run(
    target: PreTrainedModel, cache: Cache, read: list[int], kind: type[SlotLayer]
) -> Callable[..., tuple[Tensor, ...]]:
    """Make a function that runs the target over the first `size` slots of buffers, with a mask for each layer type.

    It returns logits of the nodes `kept`, then hidden states at indices `read`. `kind` is its cache layers' class.
    """
    # `None` for a layer that gets buffers at each forward. A layer that uses another layer's keys needs no buffers.
    placeholders = [
        None if getattr(layer, "keys", None) is not None else _StatesAlone() if holds_state(layer) else layer
        for layer in cache.layers
    ]
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
    """An empty cache layer, for a recurrent layer without attention: its states are in the `WholeTree`."""

    is_compileable = supports_early_init = False
