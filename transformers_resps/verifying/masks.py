"""Compute the positions of a tree's nodes, and the attention mask of each layer type.

For a new type of attention, add its name to `ATTENTION_TYPES`, and to `AttentionPattern` a field that `mask` uses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from ..tree import DraftTree
from .cache import cached_length, window_of


# Layer types (names in a config's `layer_types`) whose attention an `AttentionPattern` describes.
ATTENTION_TYPES = frozenset(("full_attention", "sliding_attention"))
# Layer types with a recurrent state instead of keys and values.
RECURRENT_TYPES = frozenset(("linear_attention", "conv", "mamba"))
# Layer types with both a recurrent state and attention -> the layer type whose mask their attention gets.
HYBRID_TYPES = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
# Layer types that compute each token by itself.
FEED_FORWARD_TYPES = frozenset(("mlp", "moe"))
# Config fields with the number of learned position embeddings: Whisper's, LED's, and all other models'.
_TABLE_SIZES = ("max_target_positions", "max_decoder_position_embeddings", "max_position_embeddings")

# The additive mask of a target's forward, or a dict of them by layer type; `None` where the target needs none.
Masks = Tensor | dict[str | None, Tensor | None] | None


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """Defines, by positions, which keys a query attends to; all layers of the same type share one pattern."""

    window: int | None = None  # number of positions that a query sees, up to its own; `None`: all
    is_causal: bool = True  # whether a query sees no later position

    def mask(self, queries: Tensor, keys: Tensor, seen: Tensor | None = None) -> Tensor:
        """Make the bool mask `[..., q, s]`, true where a query sees a key; `queries` and `keys` are positions.

        Both broadcast to the mask's shape. `seen` is a bool mask that already hides padding, other branches and later
        keys; the result also hides keys outside the window. Without `seen`, positions alone decide.
        """
        if seen is None:
            seen = keys <= queries if self.is_causal else torch.ones_like(queries - keys, dtype=torch.bool)
        return seen if self.window is None else seen & (queries - keys < self.window)

    def cuts(self, length: int) -> bool:
        """Whether the window hides any key in a text of `length` tokens."""
        return self.window is not None and length > self.window


def additive(seen: Tensor, dtype: torch.dtype, *, past: int = 0, hidden: float | None = None) -> Tensor:
    """Turn the bool mask `seen` into an additive mask: 0 where true, else `hidden` (default: the dtype's minimum).

    The result begins with `past` more columns, for keys that all queries see. Targets get no bool masks, because eager
    attention would add such a mask to the scores, and so hide nothing.
    """
    mask = seen.new_zeros(*seen.shape[:-1], past + seen.shape[-1], dtype=dtype)
    mask[..., past:].masked_fill_(~seen, torch.finfo(dtype).min if hidden is None else hidden)
    return mask


def layer_types(model: PreTrainedModel) -> set[str]:
    """Return the types of the target's layers; empty if its config names none."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def unknown_layer_types(model: PreTrainedModel) -> set[str]:
    """Return the types of the target's layers for which this module has no masks."""
    return layer_types(model) - ATTENTION_TYPES - RECURRENT_TYPES - FEED_FORWARD_TYPES - {"hybrid"}


def attention_patterns(config: PretrainedConfig, cache: Cache) -> dict[str | None, AttentionPattern | None]:
    """Map each layer type to its pattern; the target looks up its masks by the same keys.

    The pattern is `None` for layers without attention. A config without layer types gives one pattern, at key `None`.
    """
    types = getattr(config.get_text_config(), "layer_types", None)
    if not types:
        return {None: AttentionPattern(window_of(cache, 0))}
    patterns: dict[str | None, AttentionPattern | None] = dict.fromkeys(RECURRENT_TYPES | FEED_FORWARD_TYPES)
    for name in dict.fromkeys(types):
        if name not in patterns:
            patterns[HYBRID_TYPES.get(name, name)] = AttentionPattern(window_of(cache, types.index(name)))
    return patterns


def tree_attention_mask(
    config: PretrainedConfig,
    cache: Cache,
    prefix_mask: Tensor | None,
    tree: DraftTree,
    dtype: torch.dtype,
    ends: Tensor | None = None,
) -> Masks:
    """Make the additive attention mask of a forward over a tree, whose keys will be appended to `cache`.

    `prefix_mask` `[b, s]` is 0 where a cache slot is empty or holds padding; `None` if there are no such slots. `ends`
    `[b, 1]` is the first slot after each row's text; `None` if all rows end where the cache ends.

    Returns a mask `[b, 1, n, visible past + n]`, or a dict from layer type to mask (`None` for no attention).
    """
    (rows, count), device, past = tree.tokens.shape, tree.tokens.device, cached_length(cache)

    def mask_of(pattern: AttentionPattern) -> Tensor:  # windows count cache slots; a node's slot is `ends` + depth
        visible = past if pattern.window is None else min(past, pattern.window - 1)
        is_cut = pattern.cuts(past + count)
        if prefix_mask is None and not is_cut:
            return additive(tree.ancestors, dtype, past=visible)[:, None]
        past_slots = torch.arange(past - visible, past, device=device).expand(rows, -1)
        if ends is not None and pattern.window is not None:  # rows are right-aligned there, see `compact_ragged`
            past_slots = past_slots + ends - past
        if prefix_mask is None:
            seen = torch.ones_like(past_slots, dtype=torch.bool)
        else:
            seen = (prefix_mask.gather(1, past_slots.clamp(min=0)) != 0) & (past_slots >= 0)
        seen = torch.cat([seen[:, None].expand(-1, count, -1), tree.ancestors], dim=-1)
        if is_cut:
            node_slots = tree.depths + (past if ends is None else ends)
            key_slots = torch.cat([past_slots, node_slots], dim=1)
            seen = pattern.mask(node_slots[..., None], key_slots[:, None], seen)
        return additive(seen, dtype)[:, None]

    patterns = attention_patterns(config, cache).items()
    masks = {name: None if pattern is None else mask_of(pattern) for name, pattern in patterns}
    return masks.get(None, masks)


def tree_positions(tree: DraftTree, root_positions: Tensor | float) -> Tensor:
    """Return the nodes' position ids `[..., b, n]`: depths plus `root_positions`, `[..., b, 1]` or one number."""
    return tree.depths + root_positions


def last_position(config: PretrainedConfig, root_position: int) -> int | None:
    """Return the largest position that nodes may have if the first root has `root_position`; `None` without a limit.

    Learned position embeddings limit it to the size of their table, and 'longrope' to the end of the original context:
    a later node would change the RoPE frequencies of earlier nodes in its forward, unlike in plain decoding.
    """
    config = config.get_text_config()
    boundary = longrope_boundary(config)
    if boundary is not None:
        return boundary - 1 if root_position < boundary else None
    most = next((getattr(config, name) for name in _TABLE_SIZES if getattr(config, name, None) is not None), None)
    return None if getattr(config, "rope_parameters", None) or most is None else int(most) - 1


def longrope_boundary(config: PretrainedConfig) -> int | None:
    """Find the first position for which 'longrope' switches to its long frequencies; `None` for other RoPE types."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
