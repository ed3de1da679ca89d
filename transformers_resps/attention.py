"""What the target attends to when it verifies a tree: masks and positions.

Knows the target's layer types; nothing of drafting or acceptance.
"""

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig

from .cache import cached_length, visible_length, window_of
from .tree import DraftTree


def tree_positions(tree: DraftTree, root_positions: Tensor) -> Tensor:
    """Position ids `[b, n]` of the nodes, given those of the roots `[b]`."""
    return root_positions[:, None] + tree.depths


def tree_attention_mask(
    config: PretrainedConfig, cache: Cache, prefix_mask: Tensor | None, tree: DraftTree, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The additive 4-D mask of a tree's forward.

    Args:
        config: the target's.
        cache: before the forward.
        prefix_mask: `[b, s]`, 0 where a cached position is padding; `None` when there is no padding.
        tree: the nodes to verify.
        dtype: the target's.

    Returns:
        `[b, 1, n, visible past + n]` of zeros and the dtype's minimum, or a dict of them by layer type where the
        target has several. A float mask on purpose: eager attention would add a bool one to the scores.
    """
    layer_types = getattr(config.get_text_config(), "layer_types", None)
    if layer_types is None:
        return _mask(cache, 0, prefix_mask, tree, dtype)
    first = {kind: layer_types.index(kind) for kind in dict.fromkeys(layer_types)}
    return {kind: _mask(cache, index, prefix_mask, tree, dtype) for kind, index in first.items()}


def _mask(cache: Cache, layer_index: int, prefix_mask: Tensor | None, tree: DraftTree, dtype: torch.dtype) -> Tensor:
    """The mask of one layer. Sliding windows count in slots, as Transformers' own masks do: a node's slot is where it
    would stand if its path were the text.
    """
    past, visible = cached_length(cache), visible_length(cache, layer_index)
    batch_size, node_count = tree.tokens.shape
    minimum = torch.finfo(dtype).min
    device = tree.tokens.device
    mask = torch.zeros(batch_size, 1, node_count, visible + node_count, dtype=dtype, device=device)
    if prefix_mask is not None:
        hidden = prefix_mask[:, None, None, past - visible : past] == 0
        mask[..., :visible].masked_fill_(hidden, minimum)
    mask[..., visible:].masked_fill_(~tree.ancestors[:, None], minimum)
    window = window_of(cache, layer_index)
    if window is not None and past + node_count > window - 1:
        node_slots = (past + tree.depths)[:, None, :, None]  # [b, 1, n, 1]
        past_slots = torch.arange(past - visible, past, device=device).expand(batch_size, -1)
        key_slots = torch.cat([past_slots, past + tree.depths], dim=1)[:, None, None, :]
        mask.masked_fill_(key_slots <= node_slots - window, minimum)
    return mask
