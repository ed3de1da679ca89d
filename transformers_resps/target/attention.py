"""What the target attends to when it verifies a tree: masks and positions."""

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig

from ..tree import DraftTree
from .known_mixers import RECURRENT_KINDS
from .tree_cache import cached_length, visible_length, window_of


def tree_positions(tree: DraftTree, root_positions: Tensor | int) -> Tensor:
    """Position ids `[b, n]` of the nodes, given those of the roots `[b, 1]`, or that of all roots."""
    return tree.depths + root_positions


def last_position(config: PretrainedConfig, root_position: int) -> int | None:
    """The largest position that a node may take; `None` where there is no limit.

    A table of learned positions ends there. 'longrope' switches the frequencies of a whole forward as soon as one
    position passes the original context; plain decoding does so one token at a time.

    Args:
        config: the target's.
        root_position: of the first tree.
    """
    config = config.get_text_config()
    boundary = longrope_boundary(config)
    if boundary is not None:
        return boundary - 1 if root_position < boundary else None
    most = getattr(config, "max_position_embeddings", None)
    return None if getattr(config, "rope_parameters", None) or most is None else int(most) - 1


def longrope_boundary(config: PretrainedConfig) -> int | None:
    """The first position at which 'longrope' switches the frequencies of a whole forward; `None` for other ropes."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def tree_attention_mask(
    config: PretrainedConfig,
    cache: Cache,
    prefix_mask: Tensor | None,
    tree: DraftTree,
    dtype: torch.dtype,
    ends: Tensor | None = None,
) -> Tensor | dict[str, Tensor | None]:
    """Make the additive 4-D mask of a tree's forward.

    Args:
        config: the target's.
        cache: before the forward.
        prefix_mask: `[b, s]`, 0 where a row has no entry in a slot, or padding; `None` when there is no such slot.
        tree: the nodes to verify.
        dtype: the target's.
        ends: `[b, 1]` the slot after each row's last entry; `None` when all rows end with the cache.

    Returns:
        `[b, 1, n, visible past + n]`: 0 where a node may look, else the dtype's minimum. A dict of masks by layer type
        where the target has several types; `None` for recurrent ones. A float mask on purpose: eager attention adds a
        bool one to the scores.
    """
    layer_types = getattr(config.get_text_config(), "layer_types", None)
    if layer_types is None:
        return _mask(cache, 0, prefix_mask, tree, dtype, ends)
    masks: dict[str, Tensor | None] = dict.fromkeys(RECURRENT_KINDS)  # a node is no padding
    for kind in dict.fromkeys(layer_types):
        if kind not in masks:
            mask = _mask(cache, layer_types.index(kind), prefix_mask, tree, dtype, ends)
            masks |= {"full_attention": mask} if kind == "hybrid" else {kind: mask}
    return masks


def _mask(
    cache: Cache,
    layer_index: int,
    prefix_mask: Tensor | None,
    tree: DraftTree,
    dtype: torch.dtype,
    ends: Tensor | None,
) -> Tensor:
    """The mask of one layer. Sliding windows count in slots, as Transformers' own masks do: a node's slot is where it
    would stand if its path were the text.
    """
    past, visible, window = cached_length(cache), visible_length(cache, layer_index), window_of(cache, layer_index)
    batch_size, node_count = tree.tokens.shape
    minimum = torch.finfo(dtype).min
    device = tree.tokens.device
    mask = torch.zeros(batch_size, 1, node_count, visible + node_count, dtype=dtype, device=device)
    mask[..., visible:].masked_fill_(~tree.ancestors[:, None], minimum)
    slides = window is not None and past + node_count > window - 1
    if prefix_mask is None and not slides:
        return mask
    past_slots = torch.arange(past - visible, past, device=device).expand(batch_size, -1)
    if ends is not None and window is not None:  # rows end where the layer ends, see `compact_ragged`
        past_slots = past_slots + ends - past
    if prefix_mask is not None:
        hidden = (prefix_mask.gather(1, past_slots.clamp(min=0)) == 0) | (past_slots < 0)
        mask[..., :visible].masked_fill_(hidden[:, None, None], minimum)
    if window is not None and slides:
        node_slots = tree.depths + (past if ends is None else ends)  # [b, n]
        key_slots = torch.cat([past_slots, node_slots], dim=1)[:, None, None, :]
        mask.masked_fill_(key_slots <= node_slots[:, None, :, None] - window, minimum)
    return mask
