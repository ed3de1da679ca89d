"""Run heads over whole texts at once, for training and diagnosis.

A draft head runs level after level: level k predicts the (k + 1)-th drafted token at every position. From level 1 on,
the head reads its own output, as in drafting (EAGLE-3, arXiv 2503.01840, section 3.2). A block head drafts a whole
block of tokens at each of many positions.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafting import ALL, Entries, TrainableModel, Wanted
from ..verifying.attention import attend
from ..verifying.masks import AttentionPattern
from .block_head import BoundBlockHead


_ANCHORS = 64  # Number of blocks that `unroll_blocks` fills in one pass over a text.


class UnrolledEntries(Entries):
    """Stores the keys and values of all levels so far, and computes the attention of the current level k.

    A position attends to the text up to itself (keys of level 0), and to its own keys of levels 1 to k, just as in
    drafting a node at depth k attends to the text and its path. Only the positions `slots` `[b, q]` have queries.

    Our layers compute one softmax over `[t + k]` scores, without a dense `(k t)^2` mask. Layers of Transformers get a
    mask `[q, k q + t]`, in which the keys of levels 1 to k come first.
    """

    def __init__(self, slots: Tensor, length: int) -> None:
        self._sees = torch.arange(length, device=slots.device) <= slots[:, None, :, None]  # [b, 1, q, t]
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}  # layer -> keys and values of each level

    @property
    def mask(self) -> Tensor | None:  # type: ignore[override]  # depends on the level
        """The attention mask of the next pass; `None` for level 0, where attention is causal."""
        count = self._sees.shape[2]
        if not self._own_entries:
            return None
        own = torch.eye(count, dtype=torch.bool, device=self._sees.device).repeat(1, self._own_entries // count)
        return torch.cat([own.expand(len(self._sees), 1, -1, -1), self._sees], dim=-1)

    @property
    def first_slot(self) -> int:  # type: ignore[override]  # depends on the level
        return -self._own_entries

    @property
    def _own_entries(self) -> int:
        """Number of keys of levels 1 to k: q for each level. Valid only before the keys of level k are stored."""
        return self._sees.shape[2] * len(next(iter(self._kept.values()), ()))

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        kept = self._kept.setdefault(layer_idx, [])
        kept.append((keys, values))
        (text_keys, *own_keys), (text_values, *own_values) = zip(*kept, strict=True)
        return torch.cat([*own_keys, text_keys], dim=2), torch.cat([*own_values, text_values], dim=2)

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kept = self._kept.setdefault(layer, [])
        kept.append((keys, values))
        if len(kept) > 1:
            return self._next_level(queries, kept)
        mask = None if queries.shape[2] == keys.shape[2] else self._sees
        shares = queries.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, enable_gqa=shares)

    def _next_level(self, queries: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Compute each query's attention to the text up to its position, and to its own keys of levels 1 to k."""
        (true_keys, *own_keys), (true_values, *own_values) = zip(*kept, strict=True)
        if queries.device.type == "cpu":  # other devices' fused attention does not return the sum of weights
            dtype = true_values.dtype  # under autocast, rotated states are in float32
            added = torch.zeros_like(self._sees, dtype=dtype).masked_fill(~self._sees, float("-inf"))
            parts = queries, true_keys, true_values, torch.stack(own_keys), torch.stack(own_values)
            return cast(Tensor, _FusedLevel.apply(*(part.to(dtype) for part in parts), added))  # type: ignore[no-untyped-call]  # untyped upstream
        batch, heads, length, width = queries.shape
        groups = true_keys.shape[1]
        grouped = queries.reshape(batch, groups, heads // groups, length, width) * width**-0.5
        scores = grouped.flatten(2, 3) @ true_keys.mT  # [b, kv heads, group * length, t]
        scores = scores.unflatten(2, (heads // groups, length)).masked_fill(~self._sees[:, None], float("-inf"))
        diagonals = [(grouped * own[:, :, None]).sum(-1, keepdim=True) for own in own_keys]
        total, exact = true_keys.shape[2], torch.promote_types(true_values.dtype, torch.float32)
        weights = torch.cat([scores, *diagonals], dim=-1).softmax(-1, dtype=exact).to(true_values.dtype)
        attended: Tensor = (weights[..., :total].flatten(2, 3) @ true_values).unflatten(2, (heads // groups, length))
        for index, own in enumerate(own_values):
            attended = attended + weights[..., total + index, None] * own[:, :, None]
        return attended.reshape(batch, heads, length, width)


class _FusedLevel(torch.autograd.Function):
    """`UnrolledEntries._next_level` without the matrix of scores: fused attention to the text, then the own keys.

    The fused backward function computes weights from the logarithm of their sum. Given that of all keys, its gradients
    are those of one softmax over all keys, as in ring attention (arXiv 2310.01889, section 3).
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, added: Tensor
    ) -> Tensor:
        """Attend to `keys` `[b, kv heads, t, hd]`, masked by `added`, and to `own_keys` `[k, b, kv heads, q, hd]`."""
        of_text, text_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=added
        )
        grouped, exact = _grouped(queries, keys), text_sum.dtype  # float32 at least
        scores = (grouped * own_keys[:, :, :, None]).sum(-1, dtype=exact) * queries.shape[-1] ** -0.5
        text_sum = text_sum.unflatten(1, grouped.shape[1:3])
        total = torch.cat([scores, text_sum[None]]).logsumexp(0)  # [b, kv heads, group, q]
        weights = (scores - total).exp()[..., None]
        attended = _grouped(of_text, keys) * (text_sum - total).exp()[..., None]
        attended = (attended + (weights * own_values[:, :, :, None]).sum(0)).to(queries.dtype).flatten(1, 2)
        ctx.save_for_backward(
            queries, keys, values, own_keys, own_values, added, attended, total.flatten(1, 2), weights
        )
        return attended

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, own_keys, own_values, added, attended, total, weights = ctx.saved_tensors
        of_queries, of_keys, of_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            slope, queries, keys, values, attended, total, 0.0, False, attn_mask=added
        )
        slopes, grouped = _grouped(slope, keys), _grouped(queries, keys)
        mean = (slopes * _grouped(attended, keys)).sum(-1, keepdim=True, dtype=total.dtype)
        of_scores = (slopes * own_values[:, :, :, None]).sum(-1, keepdim=True, dtype=total.dtype) - mean
        of_scores = of_scores * weights * queries.shape[-1] ** -0.5  # [k, b, kv heads, group, q, 1]
        of_queries = of_queries + (of_scores * own_keys[:, :, :, None]).sum(0).flatten(1, 2)
        of_own_keys, of_own_values = (grouped * of_scores).sum(3), (slopes * weights).sum(3)
        grads = of_queries, of_keys, of_values, of_own_keys, of_own_values
        return *(grad.to(slope.dtype) for grad in grads), None


def _grouped(states: Tensor, keys: Tensor) -> Tensor:
    """Group heads by the key head that they read: `[b, heads, q, hd]` -> `[b, kv heads, group, q, hd]`."""
    return states.unflatten(1, (keys.shape[1], -1))


def unroll(
    model: TrainableModel,
    features: Tensor,
    tokens: Tensor,
    levels: int,
    slots: Tensor | None = None,
    *,
    first_pass: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Predict the next `levels` tokens at every position of whole texts: `[levels, b, q, h]`, after the final norm.

    At level k, the slot of position t reads the true token t + 1 + k, placed at position t + k, and predicts token
    t + 2 + k. Level 0 also reads the features; later levels read the output of the level before instead. Outputs that
    predict a token after the end of the text are meaningless.

    If the model has several depths, level k runs depth k, which sees only keys of that depth. `features` are
    `[b, t, F]`, `tokens` `[b, t]`, and `slots` `[b, q]` the ascending positions that need predictions; others only get
    keys and values at level 0. `first_pass` replaces `model.run` at level 0.
    """
    batch, length = tokens.shape
    everywhere = torch.arange(length, device=features.device).expand(batch, length)
    slots = everywhere if slots is None else slots
    later = slots if model.depths == 1 else everywhere  # the slots of levels 1 and later
    texts = torch.arange(batch, device=features.device)[:, None]
    tokens, fused = F.pad(tokens, (0, levels)), model.fuse(features.to(model.dtype))
    at, hidden, entries, outputs = everywhere, fused, UnrolledEntries(later, length), list[Tensor]()
    run, wanted = first_pass or model.run, cast(Wanted, later)
    for level in range(levels):
        depth = min(level, model.depths - 1)
        entries = UnrolledEntries(later, length) if depth else entries
        output = run(depth, tokens[texts, at + level + 1], hidden, model.places(at + level), entries, wanted)
        outputs.append(model.normed(output, depth))
        fed = model.feedback(output, hidden if level or model.depths > 1 else hidden[texts, later])
        assert fed is not None
        hidden = fed
        at, run, wanted = later, model.run, ALL
    states = torch.stack(outputs)
    return states if model.depths == 1 else states[:, texts, slots]


def unroll_blocks(model: BoundBlockHead, features: Tensor, tokens: Tensor, levels: int, slots: Tensor) -> Tensor:
    """Draft a block after token p + 1 for each position p in `slots` `[b, q]`; return normed outputs
    `[levels, b, q, h]`. The outputs for a text's last position are meaningless, because no token follows it.
    """
    anchors = (slots + 1).clamp(max=tokens.shape[1] - 1)
    blocks = [run_blocks(model, features, tokens, some, levels) for some in anchors.split(_ANCHORS, dim=1)]
    return torch.cat([model.normed(model.predicting(part, levels)) for part in blocks], dim=1).movedim(2, 0)


def run_blocks(model: BoundBlockHead, features: Tensor, tokens: Tensor, anchors: Tensor, levels: int) -> Tensor:
    """Fill a block at each of m anchors; return the outputs `[b, m, q, h]` of its q slots, after the final norm.

    `features` `[b, t, F]` and `tokens` `[b, t]` belong to whole texts, `anchors` `[b, m]` are the positions of the
    blocks' first tokens. Each block predicts `levels` tokens. It attends to itself and to the features strictly before
    its anchor, but to no other block (DFlash, arXiv 2602.06036, section 3).
    """
    (rows, length), blocks, count = tokens.shape, anchors.shape[1], model.width(levels)
    fused, order = model.fuse(features.to(model.dtype)), torch.arange(length, device=features.device)
    text, inside = model.head.rope(order[None]), torch.arange(count, device=features.device)
    positions = anchors[..., None] + inside  # [b, m, q]
    slots = torch.arange(blocks * count, device=features.device)
    before = order < anchors.repeat_interleave(count, dim=1)[..., None]  # [b, m * q, t]
    same = slots[:, None] // count == slots // count

    def masked(pattern: AttentionPattern) -> Tensor:
        near = pattern.mask(positions.flatten(1)[..., None], order, before)
        own = pattern.mask(slots[:, None], slots) & same  # a block is shorter than the window
        return torch.cat([near, own.expand(rows, -1, -1)], dim=-1)[:, None]

    def together(states: Tensor) -> Tensor:
        """Join the blocks of a text: `[b * m, heads, q, hd]` -> `[b, heads, m * q, hd]`."""
        return states.reshape(rows, blocks, *states.shape[1:]).transpose(1, 2).flatten(2, 3)

    masks = {pattern: masked(pattern) for pattern in dict.fromkeys(model.patterns)}

    def attend_block(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        entries = zip(model.head.layers[layer].self_attn.entries(fused, text), (keys, values), strict=True)
        keys, values = (torch.cat([of_text, together(own)], dim=2) for of_text, own in entries)
        attended = attend(together(queries), keys, values, masks[model.patterns[layer]])
        return attended.reshape(rows, -1, blocks, *queries.shape[2:]).transpose(1, 2).flatten(0, 1)

    roots = F.pad(tokens.gather(1, anchors).flatten()[:, None], (0, count - 1), value=model.mask_token_id)
    return model.run_block(roots, model.places(positions.flatten(0, 1)), attend_block).unflatten(0, (rows, blocks))
