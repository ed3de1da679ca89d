"""EAGLE-3's training-time test: the head reads its own output for K levels, as it will when it drafts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..head import DraftHead
from ..head.layer import Attend


class UnrolledAttention:
    """Attention of level k: causal over the entries of level 0, plus the own position's entry of levels 1 to k.

    That is what a node at depth k sees when drafting: true features of the prefix, then its own chain. One softmax
    over `[t + k]` scores; the dense `(k t)^2` mask is never built.

    Args:
        start: levels after the first are computed for positions `[start, t)` only.
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self._keys: dict[int, list[Tensor]] = {}
        self._values: dict[int, list[Tensor]] = {}

    def first_level(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`Attend` of level 0, over all positions."""
        self._keys[layer], self._values[layer] = [keys], [values]
        grouped = queries.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)

    def next_level(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`Attend` of a later level, over positions `[start, t)`."""
        self._keys[layer].append(keys)
        self._values[layer].append(values)
        (true_keys, *own_keys), (true_values, *own_values) = self._keys[layer], self._values[layer]
        batch, heads, length, width = queries.shape
        groups = keys.shape[1]
        grouped = queries.reshape(batch, groups, heads // groups, length, width) * width**-0.5
        scores = grouped.flatten(2, 3) @ true_keys.mT  # [b, kv heads, group * length, t]
        scores = scores.unflatten(2, (heads // groups, length)) + self._causal(length, true_keys)
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

    def _causal(self, length: int, keys: Tensor) -> Tensor:
        """`[length, t]`, 0 where a query of `[start, t)` may look and -inf elsewhere."""
        mask: Tensor = keys.new_full((length, keys.shape[2]), float("-inf"))
        return torch.triu(mask, self.start + 1)


def unroll(
    head: DraftHead,
    features: Tensor,
    embeddings: Tensor,
    levels: int,
    start: int = 0,
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
        start: the first slot any level's prediction is wanted for.
        first_pass: the head as wrapped for distributed training; it needs one forward for its gradient hooks.

    Returns:
        `[levels, b, t - start, h]`, after the head's final norm.

    Source: EAGLE-3 (arXiv 2503.01840) section 3.2 (training-time test).
    """
    length = features.shape[1]
    positions = torch.arange(length, device=features.device)[None]
    memory = UnrolledAttention(start)
    hidden = head.fuse(features)
    outputs = []
    for level in range(levels):
        tokens = _shifted(embeddings, level + 1)
        if level == 0:
            attend: Attend = memory.first_level
            hidden = (first_pass or head)(hidden, tokens, positions, attend)[:, start:]
        else:
            hidden = head(head.feedback(hidden), tokens[:, start:], positions[:, start:] + level, memory.next_level)
        outputs.append(head.norm(hidden))
    return torch.stack(outputs)


def _shifted(embeddings: Tensor, by: int) -> Tensor:
    """`[b, t, h]` moved `by` positions to the left; zeros come in."""
    return F.pad(embeddings[:, by:], (0, 0, 0, min(by, embeddings.shape[1])))
