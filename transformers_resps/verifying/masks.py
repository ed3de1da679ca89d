"""Who sees what: where the nodes of a tree stand, which keys each type of layer shows them, and the masks for it.

A new type of attention is a case in this file: its name in `ATTENTION_TYPES`, a field of `AttentionPattern`, and its
rule in `AttentionPattern.mask`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from ..tree import DraftTree
from .cache import cached_length, window_of


# Layer types, as a config's `layer_types` names them, that attend as an `AttentionPattern` says.
ATTENTION_TYPES = frozenset(("full_attention", "sliding_attention"))
# Layer types that keep a state in place of keys and values.
RECURRENT_TYPES = frozenset(("linear_attention", "conv", "mamba"))
# Layer types with a state beside keys and values -> the type whose mask their attention asks for.
HYBRID_TYPES = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
# Layer types that mix no tokens.
FEED_FORWARD_TYPES = frozenset(("mlp", "moe"))
# Names of the number of learned positions in configs: Whisper's, LED's, all others'.
_TABLE_SIZES = ("max_target_positions", "max_decoder_position_embeddings", "max_position_embeddings")

# The additive mask of a target's forward, or a dict of them by layer type; `None` where the target needs none.
Masks = Tensor | dict[str | None, Tensor | None] | None


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """Which keys of a text a query sees, by the positions of both; equal for all layers of one type.

    Attributes:
        window: newest positions that a query sees, its own included; `None` for all.
        is_causal: whether a query sees no later position.
    """

    window: int | None = None
    is_causal: bool = True

    @classmethod
    def of_type(cls, layer_type: str, config: PretrainedConfig) -> "AttentionPattern":
        """Make the pattern of a layer type from a text config alone; `attention_patterns` asks the cache as well."""
        return cls(config.sliding_window if layer_type == "sliding_attention" else None)

    def mask(self, queries: Tensor, keys: Tensor, seen: Tensor | None = None) -> Tensor:
        """Make the bool mask that is true where a query sees a key.

        Args:
            queries: their positions; they broadcast with those of the keys to `[..., q, s]`.
            keys: likewise.
            seen: what padding and a tree's ancestors leave to see, later keys hidden; `None` goes by positions alone.
        """
        if seen is None:
            seen = keys <= queries if self.is_causal else torch.ones_like(queries - keys, dtype=torch.bool)
        return seen if self.window is None else seen & (queries - keys < self.window)

    def cuts(self, length: int) -> bool:
        """Whether a text of so many positions has a key that a later query does not see."""
        return self.window is not None and length > self.window


def additive(seen: Tensor, dtype: torch.dtype, *, past: int = 0, hidden: float | None = None) -> Tensor:
    """Turn a bool mask into what is added to scores: 0 where seen, else `hidden`, by default the dtype's minimum.

    The result has `past` more keys before the others, which all queries see. Targets get additive masks on purpose:
    eager attention adds a bool one as well, and would show everything.
    """
    mask = seen.new_zeros(*seen.shape[:-1], past + seen.shape[-1], dtype=dtype)
    mask[..., past:].masked_fill_(~seen, torch.finfo(dtype).min if hidden is None else hidden)
    return mask


def layer_types(model: PreTrainedModel) -> set[str]:
    """The types of the target's layers; empty where its config names none."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def unknown_layer_types(model: PreTrainedModel) -> set[str]:
    """The types of the target's layers that our masks do not know."""
    return layer_types(model) - ATTENTION_TYPES - RECURRENT_TYPES - FEED_FORWARD_TYPES - {"hybrid"}


def attention_patterns(config: PretrainedConfig, cache: Cache) -> dict[str | None, AttentionPattern | None]:
    """Find the pattern of each layer type, by the name under which layers ask for their mask.

    The pattern is `None` for layers without attention. A config without types has one pattern, under the key `None`.
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
    """Make the additive mask of a tree whose entries will follow those of a cache.

    Args:
        config: the target's.
        cache: before the forward.
        prefix_mask: `[b, s]`, 0 where a row has no entry in a slot, or padding; `None` when there is no such slot.
        tree: the nodes to verify.
        dtype: the target's.
        ends: `[b, 1]` the slot after each row's last entry; `None` when all rows end with the cache.

    Returns:
        `[b, 1, n, visible past + n]`, or a dict of such masks by layer type, `None` for layers without attention.
    """
    masks = {
        name: None if pattern is None else _tree_mask(pattern, cached_length(cache), prefix_mask, tree, dtype, ends)
        for name, pattern in attention_patterns(config, cache).items()
    }
    return masks.get(None, masks)


def _tree_mask(
    pattern: AttentionPattern,
    past: int,
    prefix_mask: Tensor | None,
    tree: DraftTree,
    dtype: torch.dtype,
    ends: Tensor | None,
) -> Tensor:
    """Windows count slots, as Transformers' own masks do: a node's slot is where it would stand as text."""
    (rows, count), device = tree.tokens.shape, tree.tokens.device
    visible = past if pattern.window is None else min(past, pattern.window - 1)
    is_cut = pattern.cuts(past + count)
    if prefix_mask is None and not is_cut:
        return additive(tree.ancestors, dtype, past=visible)[:, None]
    past_slots = torch.arange(past - visible, past, device=device).expand(rows, -1)
    if ends is not None and pattern.window is not None:  # rows end where the layer ends, see `compact_ragged`
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


def tree_positions(tree: DraftTree, root_positions: Tensor | float) -> Tensor:
    """Position ids `[..., b, n]` of the nodes, given those of the roots `[..., b, 1]`, or that of all roots."""
    return tree.depths + root_positions


def last_position(config: PretrainedConfig, root_position: int) -> int | None:
    """Find the largest position that a node may take; `None` where there is no limit.

    A table of learned positions ends there. 'longrope' switches the frequencies of a whole forward as soon as one
    position passes the original context; plain decoding does so one token at a time. `root_position` is the first
    tree's.
    """
    config = config.get_text_config()
    boundary = longrope_boundary(config)
    if boundary is not None:
        return boundary - 1 if root_position < boundary else None
    most = next((getattr(config, name) for name in _TABLE_SIZES if getattr(config, name, None) is not None), None)
    return None if getattr(config, "rope_parameters", None) or most is None else int(most) - 1


def longrope_boundary(config: PretrainedConfig) -> int | None:
    """Find the first position at which 'longrope' switches the frequencies of a forward; `None` for other ropes."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
