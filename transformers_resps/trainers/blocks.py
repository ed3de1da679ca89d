"""Block heads over whole texts: blocks below many anchors at once, as in training."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.block_head import BoundBlockHead
from ..verifying.attention import attend


def unroll_blocks(model: BoundBlockHead, features: Tensor, tokens: Tensor, anchors: Tensor, levels: int) -> Tensor:
    """Fill a block below each anchor, in one pass.

    A block sees the features of the positions before its anchor, strictly, and itself; no other block (DFlash, arXiv
    2602.06036, section 3). An anchor at the end of its text predicts nothing of use.

    Args:
        model: a head, bound to its target.
        features: `[b, t, F]` of the target.
        tokens: `[b, t]` of the texts.
        anchors: `[b, m]` positions of the roots; each costs as many queries as a block has slots.
        levels: tokens to predict after each.

    Returns:
        `[levels, b, m, h]`, after the final norm.
    """
    (rows, length), blocks, count = tokens.shape, anchors.shape[1], model.width(levels)
    fused, order = model.fuse(features.to(model.dtype)), torch.arange(length, device=features.device)
    text, inside = model.places(order[None]), torch.arange(count, device=features.device)
    positions = anchors[..., None] + inside  # [b, m, q]
    slots = torch.arange(blocks * count, device=features.device)
    before = order < anchors.repeat_interleave(count, dim=1)[..., None]  # [b, m * q, t]
    same = slots[:, None] // count == slots // count

    def masked(is_causal: bool, window: int | None) -> Tensor:
        near = before if window is None else before & (positions.flatten(1)[..., None] - order < window)
        own = same & (slots <= slots[:, None]) if is_causal else same
        return torch.cat([near, own.expand(rows, -1, -1)], dim=-1)[:, None]

    def together(states: Tensor) -> Tensor:
        """`[b * m, heads, q, hd]` -> `[b, heads, m * q, hd]`."""
        return states.reshape(rows, blocks, *states.shape[1:]).transpose(1, 2).flatten(2, 3)

    kinds = list(zip(model.causal, model.windows, strict=True))
    masks = {kind: masked(*kind) for kind in dict.fromkeys(kinds)}

    def attend_block(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        entries = zip(model.context_entries(layer, fused, text), (keys, values), strict=True)
        keys, values = (torch.cat([of_text, together(own)], dim=2) for of_text, own in entries)
        attended = attend(together(queries), keys, values, masks[kinds[layer]])
        return attended.reshape(rows, -1, blocks, *queries.shape[2:]).transpose(1, 2).flatten(0, 1)

    roots = F.pad(tokens.gather(1, anchors).flatten()[:, None], (0, count - 1), value=model.mask_token_id)
    output = model.run_block(roots, model.places(positions.flatten(0, 1)), attend_block)
    return model.predicting(output.unflatten(0, (rows, blocks)), levels).movedim(2, 0)
