"""EAGLE-3's training-time test: the head reads its own output for K levels, as it will when it drafts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..head import DraftHead


class UnrolledAttention:
    """Attention of level k: causal over the entries of level 0, plus the own position's entry of levels 1 to k.

    That is what a node at depth k sees when drafting: true features of the prefix, then its own chain. One softmax
    over `[t + k]` scores; the dense `(k t)^2` mask is never built.

    Args:
        slots: `[b, q]` the positions that have queries, ascending.
        length: t.
    """

    def __init__(self, slots: Tensor, length: int) -> None:
        self._sees = torch.arange(length, device=slots.device) <= slots[:, None, :, None]  # [b, 1, q, t]
        self._keys: dict[int, list[Tensor]] = {}
        self._values: dict[int, list[Tensor]] = {}

    def first_level(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`Attend` of level 0, with keys and values of all positions."""
        self._keys[layer], self._values[layer] = [keys], [values]
        is_whole = queries.shape[2] == keys.shape[2]
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if is_whole else self._sees,
            is_causal=is_whole,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )

    def next_level(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`Attend` of a later level, over the slots alone."""
        self._keys[layer].append(keys)
        self._values[layer].append(values)
        (true_keys, *own_keys), (true_values, *own_values) = self._keys[layer], self._values[layer]
        batch, heads, length, width = queries.shape
        groups = keys.shape[1]
        grouped = queries.reshape(batch, groups, heads // groups, length, width) * width**-0.5
        scores = grouped.flatten(2, 3) @ true_keys.mT  # [b, kv heads, group * length, t]
        scores = scores.unflatten(2, (heads // groups, length)).masked_fill(~self._sees[:, None], float("-inf"))
        diagonals = [(grouped * own[:, :, None]).sum(-1, keepdim=True) for own in own_keys]
        weights = (
            torch.cat([scores, *diagonals], dim=-1)
            .softmax(-1, dtype=torch.promote_types(values.dtype, torch.float32))
            .to(values.dtype)
        )
        total = true_keys.shape[2]
        attended: Tensor = (weights[..., :total].flatten(2, 3) @ true_values).unflatten(2, (heads // groups, length))
        for index, own in enumerate(own_values):
            attended = attended + weights[..., total + index, None] * own[:, :, None]
        return attended.reshape(batch, heads, length, width)


def unroll(
    head: DraftHead,
    features: Tensor,
    embeddings: Tensor,
    levels: int,
    slots: Tensor | None = None,
    *,
    first_pass: nn.Module | None = None,
) -> Tensor:
    """Run `levels` levels over a whole text at once.

    At level k the slot t reads the true token t + 1 + k and predicts token t + 2 + k, at RoPE position t + k; later
    levels read the level before in place of the feature. Slots whose token lies beyond the text hold nothing of use.

    Args:
        head: the head in training.
        features: `[b, t, F]` of the target.
        embeddings: `[b, t, h]` of the text's tokens.
        levels: how many, at least 1.
        slots: `[b, q]` the slots that any level's prediction is wanted for, ascending; `None` for all. The others
            only give their keys and values of level 0.
        first_pass: the head as wrapped for distributed training; it needs one forward for its gradient hooks.

    Returns:
        `[levels, b, q, h]`, after the head's final norm.

    Source: EAGLE-3 (arXiv 2503.01840) section 3.2 (training-time test).
    """
    batch, length = embeddings.shape[:2]
    positions = torch.arange(length, device=features.device).expand(batch, length)
    slots = positions if slots is None else slots
    memory = UnrolledAttention(slots, length)
    tokens = F.pad(embeddings, (0, 0, 0, levels))
    hidden = (first_pass or head)(
        head.fuse(features).to(head.dtype), tokens[:, 1 : length + 1], positions, memory.first_level, wanted=slots
    )
    outputs = [head.norm(hidden)]
    texts = torch.arange(batch, device=slots.device)[:, None]
    for level in range(1, levels):
        read = tokens[texts, slots + level + 1]
        hidden = head(head.feedback(hidden), read, slots + level, memory.next_level)
        outputs.append(head.norm(hidden))
    return torch.stack(outputs)


def pack(rows: Tensor, slots: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Choose the slots that a batch's losses need: the same number q in every text.

    Args:
        rows: `[m]` the text of each predicted token.
        slots: `[k, m]` the slot that predicts it, by level; what lies before the text counts as slot 0.
        shape: b and t.

    Returns:
        `[b, q]` slots of each text, ascending, and `[k, m]` where `slots` are among them.
    """
    slots = slots.clamp(min=0)
    needed = torch.zeros(shape, dtype=torch.uint8, device=slots.device)
    needed[rows, slots] = 1
    count = max(int(needed.sum(-1).max()), 1)
    chosen = needed.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    places = torch.zeros(shape, dtype=torch.long, device=slots.device)
    places.scatter_(1, chosen, torch.arange(count, device=slots.device).expand_as(chosen))
    return chosen, places[rows, slots]
