"""Attention whose result for a token depends on its own text alone, not on what else is in the forward.

A kernel adds up the keys of a row in an order that it chooses by the shape of the whole problem, and in low precision
another order is another text. Here the keys lie in blocks that begin at fixed places of the text, and each block is a
problem of its own for PyTorch's kernel: of one size, with each key where it stands in the text, so that the kernel
does the same for a row whatever stands beside it. A softmax over the log-sum-exps of its blocks, in float64, joins
what they give to a row, as in cascade attention (https://flashinfer.ai/2024/02/02/cascade-inference.html).

A tree's first path lies where it would lie as text. Each other path has blocks of its own, with copies of what
precedes its nodes since the last border. So a node gets the bits that it would get as text, and one that is read alone
those of a long prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .attention import GROUPED, STOCK, grouped_attention, naming_attention


INVARIANT = "resps_invariant"  # name of the attention implementation
BLOCK = 64  # keys of a block
_ROWS = 4  # PyTorch's kernel on a CPU takes another path for a rest of one to three query rows


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the nodes of a tree, or the tokens of a prompt, lie in buffers in the order of the text.

    Attributes:
        slots: `[b, n]` of the nodes.
        places: `[b, blocks, BLOCK]` in the text of the entry in each slot.
        seen: `[b, n, blocks, BLOCK]` bool, which of them a node sees, itself included.
        sources: `[b, m]` slots of entries that other paths need as well.
        copies: `[b, m]` slots where they need them; m is 0 where the first path is the only one.
    """

    slots: Tensor
    places: Tensor
    seen: Tensor
    sources: Tensor
    copies: Tensor

    @classmethod
    def of_chain(cls, roots: Tensor, depths: Tensor) -> "Layout":
        """Of tokens at `depths` `[b, n]` after the places `roots` `[b, 1]`, each in the slot after the one before."""
        count = depths.shape[1]
        slots = roots + torch.arange(count)
        places = torch.arange(_in_blocks(int(roots.max()) + count)).expand(len(roots), -1)
        none = slots[:, :0]
        seen = places[:, None] <= (roots + depths)[..., None]
        return cls(slots, _cut(places), _cut(seen), none, none)

    @classmethod
    def of_tree(cls, roots: Tensor, depths: Tensor, ancestors: Tensor) -> "Layout":
        """Of a tree below the places `roots` `[b, 1]`; see `DraftTree`. All is on the host."""
        count = depths.shape[1]
        order = torch.arange(count)
        is_padding = (depths == 0) & (order > 0)
        is_leaf = (ancestors.sum(dim=1) == 1) & ~is_padding
        ranks = is_leaf.cumsum(dim=1) - 1
        rank = ranks.gather(1, (ancestors & is_leaf[..., None]).int().argmax(dim=1))  # of the first path of each node
        rank.masked_fill_(is_padding, 0)
        starts, paths = roots // BLOCK * BLOCK, int(ranks.max()) + 1
        span = _in_blocks(int((roots - starts + depths).max()) + 1)  # slots of each path, from its row's start on
        size = int(starts.max()) + paths * span
        slots = torch.where(is_padding, size + order, roots + depths + rank * span)
        places = torch.arange(size).expand(len(roots), -1)
        after = places - starts
        of_path = after.div(span, rounding_mode="floor").clamp(min=-1)  # -1: of all paths
        places = torch.where(of_path > 0, starts + after % span, places)
        is_own = (of_path < 0)[:, None] | (of_path[:, None] == rank[..., None])
        seen = is_own & (places[:, None] <= (roots + depths)[..., None])
        return cls(slots, _cut(places), _cut(seen), *_copies(roots, depths, ancestors, is_leaf, slots, span, paths))


def _copies(
    roots: Tensor, depths: Tensor, ancestors: Tensor, is_leaf: Tensor, slots: Tensor, span: int, paths: int
) -> tuple[Tensor, Tensor]:
    """Which entries each path but the first needs in its own blocks, and where: `[b, (paths - 1) * span]` each."""
    if paths == 1:
        return slots[:, :0], slots[:, :0]
    starts, within = roots // BLOCK * BLOCK, torch.arange(span)
    # of a row with fewer, other nodes: their copies are seen by none
    leaves = is_leaf.logical_not().int().argsort(dim=1, stable=True)[:, 1:paths]
    on_path = ancestors.gather(1, leaves[..., None].expand(-1, -1, ancestors.shape[2]))  # [b, paths - 1, n]
    by_depth = torch.zeros(*leaves.shape, span, dtype=torch.long)
    by_depth.scatter_add_(2, depths[:, None].expand_as(on_path), slots[:, None] * on_path)
    places = starts + within  # [b, span]
    of_nodes = by_depth.gather(2, (places - roots).clamp(0)[:, None].expand_as(by_depth))
    sources = torch.where((places < roots)[:, None], places[:, None], of_nodes)
    copies = starts[..., None] + torch.arange(1, paths)[:, None] * span + within
    return sources.flatten(1), copies.expand_as(sources).flatten(1)


def _cut(states: Tensor) -> Tensor:
    """The last dimension by blocks."""
    return states.view(*states.shape[:-1], -1, BLOCK)


def _in_blocks(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def mask_of(seen: Tensor, places: Tensor, nodes: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """The additive mask `[b, n, blocks, BLOCK]` of a kind of layers, for nodes at the places `nodes` `[b, n]`.

    `seen` and `places` are those of a `Layout`.
    """
    if window is not None:
        seen = seen & (nodes[..., None, None] - places[:, None] < window)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


class BlockMasks:
    """The masks of one forward, laid out for the heads that share keys, once for all layers that are alike."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, int, int, Tensor, Tensor]] = []

    def of(self, mask: Tensor, kv_heads: int, sharing: int) -> tuple[Tensor, Tensor]:
        """A mask of `mask_of` for rows of heads: `[blocks, 1 or b * kv heads, rows, BLOCK]`; and which of the
        n * sharing each of these rows is: they are filled up as PyTorch's kernel takes them.
        """
        for known, *kind, found, order in self._known:
            if known is mask and kind == [kv_heads, sharing]:
                return found, order
        rows = mask.shape[1] * sharing
        # One more at least: a size that may stay as it is would be compiled apart.
        order = torch.arange((rows // _ROWS + 1) * _ROWS, device=mask.device).clamp(max=rows - 1)
        blocks = mask.permute(2, 0, 1, 3)[:, :, None].expand(-1, -1, sharing, -1, -1).flatten(2, 3)
        if mask.shape[0] > 1:
            blocks = blocks[:, :, None].expand(-1, -1, kv_heads, -1, -1).flatten(1, 2)
        found = blocks.index_select(2, order)
        self._known.append((mask, kv_heads, sharing, found, order))
        return found, order


def invariant_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    resps_masks: BlockMasks | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over buffers that a `Layout` describes.

    Without `resps_masks` as `grouped_attention`: a call in another thread may run the same target meanwhile.

    Args:
        module: of the target.
        query: `[b, heads, n, hd]` of the nodes.
        key: `[b, kv heads, slots, hd]`, the nodes' own among them.
        value: like `key`; `hd` may be smaller.
        attention_mask: of `mask_of`, for the first slots.
        dropout: none; the mode is for evaluation.
        scaling: of the scores; `hd ** -0.5` when `None`.
        resps_masks: of this forward.
        s_aux: `[heads]` the scores of attention sinks.
        options: of other implementations.

    Returns:
        `[b, n, heads, hd of values]`, and nothing for the weights.
    """
    if resps_masks is None:
        options |= {} if s_aux is None else {"s_aux": s_aux}
        return grouped_attention(module, query, key, value, attention_mask, dropout, scaling, **options)
    batch_size, heads, count, size = query.shape
    kv_heads = key.shape[1]
    sharing = heads // kv_heads
    mask, order = resps_masks.of(attention_mask, kv_heads, sharing)
    rows = query.reshape(batch_size * kv_heads, sharing * count, size).index_select(1, order)
    keys, values = (_in_block_order(part, mask.shape[0]) for part in (key, value))
    narrow = values.shape[-1]
    if narrow < size:
        values = pad(values, (0, size - narrow))
    found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows.expand(mask.shape[0], -1, -1, -1), keys, values, 0.0, False, attn_mask=mask, scale=scaling
    )
    weights = _weights(sums, s_aux, sharing, count)
    attended = (weights.float()[..., None] * found).sum(dim=0, dtype=torch.float64)
    attended = attended[:, : sharing * count, :narrow].to(query.dtype)
    return attended.reshape(batch_size, heads, count, narrow).transpose(1, 2).contiguous(), None


def _in_block_order(states: Tensor, blocks: int) -> Tensor:
    """The first entries of `[b, kv heads, s, hd]` as `[blocks, b * kv heads, BLOCK, hd]`."""
    states = states.permute(2, 0, 1, 3)[: blocks * BLOCK].flatten(1, 2)
    return states.view(blocks, BLOCK, *states.shape[1:]).transpose(1, 2)


def _weights(sums: Tensor, sinks: Tensor | None, sharing: int, count: int) -> Tensor:
    """Of each block, given the log-sum-exp of its scores `[blocks, b * kv heads, rows]`, in float64."""
    scores = sums.double()
    if sinks is None:
        return scores.softmax(dim=0)
    own = sinks.double().view(-1, sharing, 1).expand(-1, -1, count).flatten(1)  # [kv heads, rows]
    own = pad(own, (0, scores.shape[2] - own.shape[1])).repeat(scores.shape[1] // own.shape[0], 1)
    return torch.cat([scores, own[None]]).softmax(dim=0)[:-1]


AttentionInterface.register(INVARIANT, invariant_attention)
AttentionMaskInterface.register(INVARIANT, sdpa_mask)


@contextmanager
def use_invariant_attention(target: PreTrainedModel) -> Iterator[None]:
    """Inside, `target`, which attends by `sdpa` or knows no other than `eager`, attends by `invariant_attention`. One
    thread at a time.
    """
    config = target.config.get_text_config()
    with naming_attention:
        own, config._attn_implementation = config._attn_implementation, INVARIANT
    try:
        yield
    finally:
        with naming_attention:
            config._attn_implementation = STOCK if own == GROUPED else own  # lent by a call in another thread
