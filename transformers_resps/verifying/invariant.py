"""Attention whose result for a token depends on its own text alone, not on what else is in the forward.

A kernel adds up the keys of a row in an order that it chooses by the shape of the whole problem, and in low precision
another order is another text. Here a token at place p of its text attends in two parts, as in cascade attention
(https://flashinfer.ai/2024/02/02/cascade-inference.html). Its *prefix*, the keys before `_prefix_ends(p)`, lies in
blocks: each is one problem of a fixed number of keys for PyTorch's kernel, which then does the same for a row whatever
stands beside it. The rest is its *tail*: a few keys of the text and the nodes of the tree, in any order, summed in
float64, whose rounding does not reach the result. One softmax over the scores of the tail and the log-sum-exp of the
blocks joins both.

So a node of a tree gets the bits that it would get as text, and one that is read alone those of a long prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .attention import GROUPED, STOCK, grouped_attention


INVARIANT = "resps_invariant"  # name of the attention implementation
BLOCK = 128  # keys of a block of the prefix
TAIL = 32  # the tail has less than two times as many keys of the text; and a tree at most as many levels
_ROWS = 4  # PyTorch's kernel on a CPU takes another path for a rest of one to three query rows


def block_count(place: int) -> int:
    """The blocks that hold the prefixes of all tokens up to `place`."""
    return -(-max(place // TAIL - 1, 0) * TAIL // BLOCK)


def _prefix_ends(places: Tensor) -> Tensor:
    """The first places that belong to the tails of tokens at `places`."""
    return (places // TAIL - 1).clamp(min=0) * TAIL


class Layout:
    """Where the nodes of a tree, or the tokens of a prompt, find their keys in buffers in the order of the text.

    Args:
        depths: `[b, n]` below the root.
        ancestors: `[b, n, n]` bool, see `DraftTree`.
        roots: `[b, 1]` the place of each row's root. Node i lies in the slot i after it.
        blocks: of the prefix.

    Attributes:
        tail: `[b, w]` slots that hold the keys of all nodes' tails.
    """

    def __init__(self, depths: Tensor, ancestors: Tensor, roots: Tensor, blocks: int) -> None:
        count = depths.shape[1]
        self._places = roots + depths  # [b, n]
        self._starts = _prefix_ends(self._places)[..., None]
        slots = _prefix_ends(roots) + torch.arange(2 * TAIL + count, device=depths.device)  # [b, w]
        self.tail = torch.minimum(slots, roots + count - 1)  # a slot that was never written may hold anything
        node = slots - roots
        index = node.clamp(0, count - 1)
        is_ancestor = ancestors.gather(2, index[:, None].expand(-1, count, -1))
        is_text = (node < 0)[:, None]
        self._tail_places = torch.where(node < 0, slots, self._places.gather(1, index))[:, None]  # [b, 1, w]
        is_node = ((node >= 0) & (node < count))[:, None]
        self._tail_seen = (is_text | (is_node & is_ancestor)) & (self._tail_places >= self._starts)
        self._prefix = torch.arange(blocks * BLOCK, device=depths.device)
        self._prefix_seen = self._prefix < self._starts
        self._rows: list[
            tuple[Tensor, int, int, tuple[Tensor, Tensor]]
        ] = []  # of masks and heads: alike in all layers

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The additive mask of the prefix, then of the tail: `[b, 1, n, blocks * BLOCK + w]`."""
        seen = torch.cat([self._prefix_seen, self._tail_seen], dim=-1)
        if window is not None:
            places = torch.cat([self._prefix.expand(len(seen), 1, -1), self._tail_places], dim=-1)
            seen = seen & (self._places[..., None] - places < window)
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    def rows(self, mask: Tensor, kv_heads: int, sharing: int) -> tuple[Tensor, Tensor]:
        """The mask for the heads that share keys as rows of one head: of the blocks `[blocks, 1 or b * kv heads, rows,
        BLOCK]`, of the tail `[b * kv heads, sharing * n, w]` in float64.
        """
        for known, *kind, rows in self._rows:
            if known is mask and kind == [kv_heads, sharing]:
                return rows
        rows = _rows_of(mask, len(self._prefix), kv_heads, sharing)
        self._rows.append((mask, kv_heads, sharing, rows))
        return rows


def _rows_of(mask: Tensor, prefix: int, kv_heads: int, sharing: int) -> tuple[Tensor, Tensor]:
    batch_size, _, count, size = mask.shape
    rows, heads = sharing * count, batch_size * kv_heads
    tail = mask[..., prefix:].double().expand(-1, sharing, -1, -1).reshape(batch_size, 1, rows, size - prefix)
    tail = tail.expand(-1, kv_heads, -1, -1).reshape(heads, rows, size - prefix)
    blocks = mask[..., :prefix].expand(-1, sharing, -1, -1).reshape(batch_size, rows, prefix // BLOCK, BLOCK)
    blocks = blocks.permute(2, 0, 1, 3)  # [blocks, b, rows, BLOCK]
    if batch_size > 1:
        blocks = blocks[:, :, None].expand(-1, -1, kv_heads, -1, -1).flatten(1, 2)
    return _filled_up(blocks, 2), tail


def _filled_up(states: Tensor, dimension: int) -> Tensor:
    """Rows as PyTorch's kernel takes them, the last one repeated. One more at least: none would be compiled apart."""
    rows = states.shape[dimension]
    order = torch.arange((rows // _ROWS + 1) * _ROWS, device=states.device)
    return states.index_select(dimension, order.clamp(max=rows - 1))


def invariant_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    resps_layout: Layout | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over buffers in the order of the text.

    Without a layout as `grouped_attention`: a call in another thread may run the same target meanwhile.

    Args:
        module: of the target.
        query: `[b, heads, n, hd]` of the nodes.
        key: `[b, kv heads, slots, hd]`, the nodes' own among them.
        value: like `key`; `hd` may be smaller.
        attention_mask: `Layout.mask`.
        dropout: none; the mode is for evaluation.
        scaling: of the scores; `hd ** -0.5` when `None`.
        resps_layout: of this forward.
        s_aux: `[heads]` the scores of attention sinks.
        options: of other implementations.

    Returns:
        `[b, n, heads, hd of values]`, and nothing for the weights.
    """
    if resps_layout is None:
        options |= {} if s_aux is None else {"s_aux": s_aux}
        return grouped_attention(module, query, key, value, attention_mask, dropout, scaling, **options)
    batch_size, heads, count, size = query.shape
    kv_heads = key.shape[1]
    sharing = heads // kv_heads
    scaling = size**-0.5 if scaling is None else scaling
    block_mask, tail_mask = resps_layout.rows(attention_mask, kv_heads, sharing)
    queries = query.reshape(batch_size * kv_heads, sharing * count, size)
    keys, values = (_tail(part, resps_layout.tail) for part in (key, value))
    scores = [torch.baddbmm(tail_mask, queries.double(), keys.transpose(1, 2), alpha=scaling)]
    blocks = len(block_mask)
    if blocks:
        found, sums = _attend_to_blocks(queries, key, value, block_mask, scaling)
        scores.append(sums.permute(1, 2, 0).double())
    if s_aux is not None:
        sinks = s_aux.double().view(1, kv_heads, sharing, 1).expand(batch_size, -1, -1, count)
        scores.append(sinks.reshape(batch_size * kv_heads, -1, 1))
    weights = torch.cat(scores, dim=-1).softmax(dim=-1) if len(scores) > 1 else scores[0].softmax(dim=-1)
    attended = torch.bmm(weights[..., : keys.shape[1]], values)
    if blocks:
        of_blocks = weights[..., keys.shape[1] : keys.shape[1] + blocks].permute(2, 0, 1)[..., None]
        attended = attended + (of_blocks * found).sum(dim=0)
    if query.dtype is torch.float32:  # where order would decide a tie: 40 bits are kept (Dekker 1971, section 4)
        high = attended * (2**13 + 1)
        attended = high - (high - attended)
    return attended.to(query.dtype).view(batch_size, heads, count, -1).transpose(1, 2).contiguous(), None


def _tail(states: Tensor, slots: Tensor) -> Tensor:
    """The entries `[b, kv heads, s, hd]` in each row's slots `[b, w]`: `[b * kv heads, w, hd]` in float64."""
    states = states.permute(2, 0, 1, 3)  # as they lie in memory
    if len(slots) == 1:
        chosen = states.index_select(0, slots[0])
    else:
        chosen = states[slots.t(), torch.arange(len(slots), device=slots.device)]
    return chosen.double().flatten(1, 2).transpose(0, 1)


def _attend_to_blocks(
    queries: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """What each block gives each row `[blocks, b * kv heads, rows, hd]`, and the log-sum-exp `[..., rows]` of its
    scores.
    """
    blocks, rows = len(mask), queries.shape[1]
    keys, values = (_in_blocks(part, blocks) for part in (key, value))
    size = values.shape[-1]
    if size < keys.shape[-1]:
        values = pad(values, (0, keys.shape[-1] - size))
    queries = _filled_up(queries, 1).expand(blocks, -1, -1, -1)
    found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, False, attn_mask=mask, scale=scaling
    )
    return found[:, :, :rows, :size], sums[:, :, :rows]


def _in_blocks(states: Tensor, blocks: int) -> Tensor:
    """The first entries of `[b, kv heads, s, hd]` as `[blocks, b * kv heads, BLOCK, hd]`."""
    states = states.permute(2, 0, 1, 3)[: blocks * BLOCK].flatten(1, 2)
    return states.view(blocks, BLOCK, *states.shape[1:]).transpose(1, 2)


AttentionInterface.register(INVARIANT, invariant_attention)
AttentionMaskInterface.register(INVARIANT, sdpa_mask)


@contextmanager
def use_invariant_attention(target: PreTrainedModel) -> Iterator[None]:
    """Inside, `target`, which attends by `sdpa` or knows no other than `eager`, attends by `invariant_attention`. One
    thread at a time.
    """
    config = target.config.get_text_config()
    own = config._attn_implementation
    config._attn_implementation = INVARIANT
    try:
        yield
    finally:
        config._attn_implementation = STOCK if own == GROUPED else own  # lent by a call in another thread
