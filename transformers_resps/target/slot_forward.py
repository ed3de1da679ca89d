"""The target's forward over a tree whose nodes go to slots, as one function of tensors."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from ..compat import CACHE_KEYWORD
from .forward import hidden_states_asked
from .gqa_attention import use_gqa_attention
from .slot_cache import SlotLayer
from .slot_table import HIDDEN
from .tree_cache import window_of


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
