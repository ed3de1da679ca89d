"""Attention whose result for a token depends only on its own text, not on the other tokens of the forward.

A kernel chooses the order in which it sums over a row's keys by the shape of the whole problem, and in low precision
another order may change the output. Here the keys are cut into blocks of one size at fixed places (indices) in the
text, and PyTorch's kernel computes each block alone. A softmax over the log-sum-exps of the blocks, in float64, joins
their results, as in cascade attention (https://flashinfer.ai/2024/02/02/cascade-inference.html).

All nodes of a tree share the blocks that end before its root; the first place after them is the border. A later block
is gathered for each path by itself, from the text and the path's nodes, and only nodes of that path query it. So a
node gets the same bits as a token of plain text, alone or in a long prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ...compilation.native import attends_natively, bf16_block_attention
from ..attention import GROUPED, STOCK, grouped_attention
from ..lending import Change, lent
from ..masks import AttentionPattern, additive
from ..slots.texts import rounded_up


INVARIANT = "resps_invariant"  # name of the attention implementation
LENT = (STOCK, GROUPED, INVARIANT)  # names that an `sdpa` target's attention may have while other threads' calls run
BLOCK = 64  # number of keys in a block
_ROWS = 4  # nodes that query a path's block together
# Query rows are filled up to a multiple of this. PyTorch's CPU kernel takes 32 rows at a time, and MKL sums the last
# one to three rows (one to seven with `MKL_CBWR=COMPATIBLE`) in another order.
_MULTIPLE = 8


def levels_below(place: int, depth: int) -> int:
    """Count the blocks that contain a tree's nodes, from the root's `place` in the text and the tree's `depth`."""
    return (place % BLOCK + depth) // BLOCK + 1


class BlockLayout(NamedTuple):
    """The blocks of keys that the nodes of a tree, or the tokens of a prompt, attend to.

    A place is a token's index in its text. The key at a place of the text lies in the slot of the same number, and the
    keys of the nodes lie in the slots after the text, in the order of the nodes. Blocks of `BLOCK` places before the
    root's are shared by all nodes. From the root's block on, each path has own blocks, gathered from the slots of its
    tokens. The nodes that attend to the same own block form groups of at most `_ROWS`; a row has g groups.
    """

    shared: Tensor  # [blocks, BLOCK], places of the keys in the blocks that all nodes share
    ends: Tensor  # [b, n], the first place in the shared blocks that a node must not see
    order: Tensor  # [any], indices of the real nodes, which come first; padding nodes get a copy of the last result
    groups: Tensor  # [b, g, _ROWS], indices of each group's nodes
    places: Tensor  # [b, g, _ROWS], places of each group's nodes; -1 where a group has fewer than `_ROWS`
    slots: Tensor  # [b, g, BLOCK], slots of the keys in each group's block, in the order of the text
    starts: Tensor  # [b, g], place of the first key in each group's block
    asked: Tensor  # [levels, b, n], index of a node among its row's grouped nodes, for each own block; -1: none

    @classmethod
    def of_chain(cls, roots: Tensor, depths: Tensor, least: int = 0) -> "BlockLayout":
        """Make the layout of text tokens at `depths` `[b, n]` after places `roots` `[b, 1]`: all blocks are shared.

        All tensors are on the CPU. For `least` see `of_tree`; here the groups and levels are empty.
        """
        rows, count = depths.shape
        none = torch.zeros(rows, least, dtype=torch.long)
        groups, slots = (none[..., None].repeat(1, 1, size) for size in (_ROWS, BLOCK))
        shared = _blocks(max(rounded_up(int(roots.max()) + count, BLOCK), least * BLOCK), roots.device)
        asked = none.new_full((least, rows, count), -1)
        return cls(shared, roots + depths + 1, torch.arange(count), groups, groups - 1, slots, none, asked)

    @classmethod
    def of_tree(cls, roots: Tensor, depths: Tensor, ancestors: Tensor, least: int = 0) -> "BlockLayout":
        """Make the layout of a `DraftTree` whose roots have the places `roots` `[b, 1]`. All tensors are on the CPU.

        The layout has at least `least` shared blocks, groups and levels.
        """
        levels = max(map(levels_below, roots[:, 0].tolist(), depths.amax(dim=1).tolist()))
        blocks, levels = max(int(roots.max()) // BLOCK, least), max(levels, least)
        layout = cls.of_sizes(roots, depths, ancestors, depths.shape[1], blocks, levels)
        used = max(int(layout.asked.max()) // _ROWS + 1, least)
        groups, places, slots, starts = (part[:, :used].contiguous() for part in layout[3:7])
        return layout._replace(groups=groups, places=places, slots=slots, starts=starts)

    @classmethod
    def of_sizes(cls, roots: Tensor, depths: Tensor, ancestors: Tensor, asking: int, blocks: int, levels: int) -> Self:
        """Make the layout for the last nodes of a tree, on any device and without a transfer to the host.

        The forward computes the last `asking` nodes; the cache holds the earlier ones. The layout has `blocks` shared
        blocks and, for each path, `levels` own blocks (at least `levels_below`) with a group for each computed node.
        """
        rows, count = depths.shape
        order, border = torch.arange(count, device=depths.device), roots // BLOCK * BLOCK
        places, first = roots + depths, count - asking
        is_padding = (depths == 0) & (order > 0)
        is_leaf = (ancestors.sum(dim=1) == 1) & ~is_padding
        ranks = is_leaf.cumsum(dim=1) - 1
        path = ranks.gather(1, (ancestors & is_leaf[..., None]).int().argmax(dim=1)).clamp(min=0)  # the first one
        block = (places - border) // BLOCK  # counted from the border
        level = torch.arange(levels, device=depths.device)[:, None]
        is_silent = is_padding | (order < first)
        is_silent = ((level > block[:, None]) | is_silent[:, None]).flatten(1)  # [b, levels * n]
        cell = (path[:, None] * levels + level).flatten(1)  # index of a path's block
        members = (cell[..., None] == torch.arange(count * levels, device=cell.device)) & ~is_silent[..., None]
        needed = rounded_up(members.sum(dim=1), _ROWS)
        before = (needed.cumsum(dim=1) - needed).gather(1, cell)
        asked = before + members.cumsum(dim=1).gather(2, cell[..., None])[..., 0] - 1
        size = _ROWS * asking * levels
        index = asked.masked_fill(is_silent, size)

        def grouped(values: Tensor, empty: int) -> Tensor:
            found = values.new_full((rows, size + 1), empty).scatter(1, index, values.repeat(1, levels))
            return found[:, :-1].view(rows, -1, _ROWS)

        of_group = cell.new_zeros(rows, size + 1).scatter(1, index, cell)[:, :-1:_ROWS]
        starts = border + of_group % levels * BLOCK
        paths = of_group.div(levels, rounding_mode="floor")
        slots = _slots(roots, _nodes_by_depth(depths, ancestors, is_leaf, paths), starts)
        asked = asked.masked_fill(is_silent, -1).view(rows, levels, count).transpose(0, 1)[..., first:]
        groups = (grouped(order.expand(rows, -1), 0) - first).clamp(min=0)
        shared, ends = _blocks(blocks * BLOCK, depths.device), border.expand(-1, asking)
        return cls(shared, ends, order[:asking], groups, grouped(places, -1), slots, starts, asked)

    def of_nodes(self, count: int, *, compiled: bool = False) -> "BlockLayout":
        """Return a copy in which nodes from `count` on are padding, which in compiled code attends to nothing."""
        if not compiled:
            return self._replace(order=self.order[:count])
        return self._replace(ends=self.ends.where(self.order < count, 0))


def _nodes_by_depth(depths: Tensor, ancestors: Tensor, is_leaf: Tensor, paths: Tensor) -> Tensor:
    """List the nodes of each group's path, padded with the root: `[b, g, n + 1]`; it ends at leaf `paths` `[b, g]`."""
    leaves = is_leaf.logical_not().int().argsort(dim=1, stable=True).gather(1, paths)
    on_path = ancestors.gather(1, leaves[..., None].expand(-1, -1, ancestors.shape[2]))  # [b, g, n]
    count = depths.shape[1]
    by_depth = depths.new_zeros(*paths.shape, count + 1)
    nodes = torch.arange(count, device=depths.device) * on_path
    return by_depth.scatter_add_(2, depths[:, None].expand_as(on_path), nodes)


def _slots(roots: Tensor, nodes: Tensor, starts: Tensor) -> Tensor:
    """List the cache slots `[b, g, BLOCK]` of the `BLOCK` positions from `starts` `[b, g]` on, for each group.

    `nodes` `[b, g, n + 1]` is the group's path. Positions after its end get the root's slot, which the mask hides.
    """
    places, first = starts[..., None] + torch.arange(BLOCK, device=starts.device), roots[..., None]
    of_nodes = first + nodes.gather(2, (places - first).clamp(0, nodes.shape[2] - 1))
    return torch.where(places < first, places, of_nodes)


def _blocks(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device).view(-1, BLOCK)


def _filled_up(part: Tensor, dim: int) -> Tensor:
    """Repeat the last entry of dimension `dim` until the dimension's size is a multiple of `_MULTIPLE`."""
    count = part.shape[dim]
    if count % _MULTIPLE == 0:
        return part
    return part.index_select(dim, torch.arange(rounded_up(count, _MULTIPLE), device=part.device).clamp(max=count - 1))


class _QueryRows(NamedTuple):
    """The query rows of one kernel call: for some nodes, the heads that share a key head, one after another."""

    heads: Tensor  # [any * b * kv heads * rows], indices into the queries [b * n * heads, hd]
    mask: Tensor  # [blocks, 1 or b * kv heads, rows, BLOCK], additive
    step: int = 0  # if rows need no copy, number of heads between two key heads' first rows; else 0

    def gathered(self, queries: Tensor, key_heads: int) -> Tensor:
        """Pick the query rows `[blocks or 1, b * kv heads, rows, hd]`; 1 if all blocks get the same rows."""
        count, size, distance = self.mask.shape[2], queries.shape[1], queries.stride(0)
        if self.step:
            return queries.as_strided((1, key_heads, count, size), (0, self.step * distance, distance, 1))
        return queries.index_select(0, self.heads).view(-1, key_heads, count, size)


class _OwnReads(NamedTuple):
    """The query rows of all groups, and where the keys and values of each group's block lie in the buffers."""

    rows: _QueryRows
    entries: Tensor  # [g * b * kv heads * BLOCK], indices of the blocks' keys among [b * kv heads * slots]
    places: Tensor  # [levels * rows * b * kv heads], indices of the groups' results, in the shared rows' order
    is_missing: Tensor | None  # [levels, rows, b * kv heads], true if a row has no block; `None` if all have one

    def gathered(self, states: Tensor) -> Tensor:
        """Gather the groups' keys or values `[g, b * kv heads, BLOCK, hd]` from `[b, kv heads, slots, hd]`."""
        entries = states.flatten(0, 2).index_select(0, self.entries)
        return entries.view(-1, states.shape[0] * states.shape[1], BLOCK, states.shape[3])


class _LayerReads(NamedTuple):
    """The query rows of a layer type: over the shared blocks and, if there are groups, over the groups' blocks."""

    shared: _QueryRows
    order: Tensor  # [b * n * heads], indices that sort the results [rows * b * kv heads] by nodes
    own: _OwnReads | None


class BlockReads:
    """Makes query rows and masks for a layout, once for all equal layers; `places` `[b, n]` are the nodes' places."""

    def __init__(self, layout: BlockLayout, places: Tensor, dtype: torch.dtype) -> None:
        self.layout, self._places, self._dtype = layout, places, dtype
        self._known: list[tuple[Tensor, int, int, _LayerReads]] = []

    def mask(self, pattern: AttentionPattern) -> Tensor:
        """Make a layer type's additive mask: a row for each node and shared block, then for each node of each group.

        Its shape is `[b, 1, n * blocks + g * _ROWS, BLOCK]`. Some targets pass a view of it to their attention.
        """
        layout = self.layout
        shared = self._shown(layout.shared, self._places[..., None, None], layout.ends[..., None, None] - 1, pattern)
        if not layout.groups.shape[1]:
            return shared.flatten(1, 2)[:, None]
        starts, places = layout.starts[..., None, None], layout.places[..., None]
        own = self._shown(starts + torch.arange(BLOCK, device=starts.device), places, places, pattern)
        return torch.cat([part.flatten(1, 2) for part in (shared, own)], dim=1)[:, None]

    def _shown(self, keys: Tensor, places: Tensor, last: Tensor, pattern: AttentionPattern) -> Tensor:
        """Make the additive mask of queries at `places`; they see the keys up to `last` that `pattern` allows."""
        seen = pattern.mask(places, keys, keys <= last)
        # Half the dtype's minimum, since kernels on a GPU multiply scores by log2(e). The minimum would become
        # infinite there, and a block with only infinite scores would get the log-sum-exp 0.
        return additive(seen, self._dtype, hidden=torch.finfo(self._dtype).min / 2)

    def for_layers(self, mask: Tensor, heads: int, kv_heads: int, slots: int) -> _LayerReads:
        """Make the query rows and indices for layers with this mask and these heads, once for all such layers."""
        for known, its_heads, its_kv_heads, found in self._known:
            if known is mask and its_heads == heads and its_kv_heads == kv_heads:
                return found
        layout, sharing = self.layout, heads // kv_heads
        order = layout.order.expand(mask.shape[0], -1)[None]
        blocks, groups = layout.shared.shape[0], layout.groups.shape[1]
        of_shared, of_groups = mask[:, 0].split([layout.ends.shape[1] * blocks, groups * _ROWS], dim=1)
        seen = of_shared.unflatten(1, (layout.ends.shape[1], blocks)).index_select(1, layout.order)
        shared = self._rows(order, seen.permute(2, 0, 1, 3), heads, kv_heads)
        own = None
        if groups:
            seen = of_groups.unflatten(1, (groups, _ROWS))
            rows = self._rows(layout.groups.transpose(0, 1), seen.transpose(0, 1), heads, kv_heads)
            own = _OwnReads(rows, self._entries(kv_heads, slots), *self._asked(sharing, kv_heads))
        found = _LayerReads(shared, self._order(sharing, kv_heads), own)
        self._known.append((mask, heads, kv_heads, found))
        return found

    def _order(self, sharing: int, kv_heads: int) -> Tensor:
        rows, nodes = self._places.shape
        device, asking = self._places.device, self.layout.order.shape[0]
        order = torch.arange(asking * sharing * rows * kv_heads, device=device).view(asking, sharing, rows, kv_heads)
        asked = torch.arange(nodes, device=device).clamp(max=asking - 1)
        return order.index_select(0, asked).permute(2, 0, 3, 1).flatten()

    def _entries(self, kv_heads: int, slots: int) -> Tensor:
        rows = self._places.shape[0]  # `len` would compile this size as a constant
        first = torch.arange(rows * kv_heads, device=self._places.device).view(rows, kv_heads, 1, 1) * slots
        return (self.layout.slots[:, None] + first).permute(2, 0, 1, 3).flatten()

    def _asked(self, sharing: int, kv_heads: int) -> tuple[Tensor, Tensor | None]:
        asked = self.layout.asked.index_select(2, self.layout.order).transpose(1, 2)[:, :, None, :, None]
        rows, device = asked.shape[3], asked.device
        asked = asked.expand(-1, -1, sharing, -1, kv_heads)
        key_heads = torch.arange(rows * kv_heads, device=device).view(rows, kv_heads)
        head = torch.arange(sharing, device=device)[:, None, None]
        fillers = asked.clamp(min=0) // _ROWS * (-_ROWS * sharing % _MULTIPLE)  # filler rows of earlier groups
        index = (asked.clamp(min=0) * sharing + fillers + head) * (rows * kv_heads) + key_heads
        index, is_missing = (_filled_up(part.flatten(3).flatten(1, 2), 1) for part in (index, asked < 0))
        return index.flatten(), is_missing if asked.shape[0] > 1 else None

    def _rows(self, nodes: Tensor, mask: Tensor, heads: int, kv_heads: int) -> _QueryRows:
        """Make query rows of `nodes` `[any, b, r]` with `mask` `[any, b, r, BLOCK]`, grouped by shared key heads."""
        rows, count = self._places.shape
        sharing = heads // kv_heads
        if nodes.numel() == 1 and -sharing % _MULTIPLE <= (count - 1) * heads:  # one node, with later heads as filler
            return _QueryRows(nodes, _filled_up(mask.expand(-1, -1, sharing, -1), 2), step=sharing)
        head = torch.arange(heads, device=nodes.device).view(kv_heads, 1, sharing)
        first = (torch.arange(rows, device=nodes.device)[:, None] * count + nodes) * heads
        mask = mask[:, :, :, None].expand(-1, -1, -1, sharing, -1).flatten(2, 3)
        if rows > 1:
            mask = mask[:, :, None].expand(-1, -1, kv_heads, -1, -1).flatten(1, 2)
        index = (first[:, :, None, :, None] + head).flatten(3)
        return _QueryRows(_filled_up(index, 3).flatten(), _filled_up(mask, 2))


def invariant_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    resps_reads: BlockReads | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention over buffers block by block, by the layout in `resps_reads`.

    `query` is `[b, heads, n, hd]`. `key` and `value` are `[b, kv heads, slots, hd]`, the nodes' own entries included;
    `hd` of values may be smaller. `attention_mask` is from `BlockReads.mask`, `scaling` is `hd ** -0.5` when `None`,
    and `s_aux` `[heads]` are scores of attention sinks. Dropout is ignored. Without `resps_reads`, in another
    thread's forward, `grouped_attention` runs.

    Returns `[b, n, heads, hd of values]`, and `None` for the weights.
    """
    if resps_reads is None:
        options |= {} if s_aux is None else {"s_aux": s_aux}
        return grouped_attention(module, query, key, value, attention_mask, dropout, scaling, **options)
    rows, heads, count, size = query.shape
    kv_heads, narrow = key.shape[1], value.shape[-1]
    if torch.compiler.is_compiling():
        if not attends_natively(query, key, value, attention_mask):
            raise NotImplementedError(
                f"no kernel of ours attends to {query.dtype} states of width {size} and {narrow}"
            )
        layout, scale = resps_reads.layout, size**-0.5 if scaling is None else scaling
        sinks = None if s_aux is None else s_aux.to(query.dtype)
        reads = attention_mask, layout.groups, layout.slots, sinks, scale
        return bf16_block_attention(query, key, value, *reads), None
    read = resps_reads.for_layers(attention_mask, heads, kv_heads, key.shape[2])
    queries = query.transpose(1, 2).reshape(-1, size)
    parts = []
    if read.shared.mask.shape[0]:
        entries = [_shared_entries(part, read.shared.mask.shape[0]) for part in (key, value)]
        parts.append(_attended(queries, read.shared, entries, scaling))
    if read.own is not None:
        entries = [read.own.gathered(part) for part in (key, value)]
        parts.append(_in_order(read.own, *_attended(queries, read.own.rows, entries, scaling)))
    sums, results = zip(*parts, strict=True)
    weights = _weights(sums[0] if len(sums) == 1 else torch.cat(sums), s_aux, heads // kv_heads)
    joined = _widened(results).mul_(weights[..., None]).sum(dim=0).to(query.dtype)  # blocks one after another
    joined = joined.flatten(0, 1).index_select(0, read.order).view(rows, count, heads, size)
    return joined if narrow == size else joined[..., :narrow].contiguous(), None


def _shared_entries(states: Tensor, blocks: int) -> Tensor:
    """View the first entries of `[b, kv heads, slots, hd]` as `[blocks, b * kv heads, BLOCK, hd]`."""
    (rows, kv_heads, _, size), (_, of_head, of_slot, step) = states.shape, states.stride()
    return states.as_strided((blocks, rows * kv_heads, BLOCK, size), (BLOCK * of_slot, of_head, of_slot, step))


def _attended(
    queries: Tensor, rows: _QueryRows, entries: list[Tensor], scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Compute attention within each block of keys and values, `[blocks, b * kv heads, BLOCK, hd or less]`.

    Returns the log-sum-exps `[blocks, rows, b * kv heads]` and the results `[blocks, rows, b * kv heads, hd]`, in the
    order in which a CPU's kernel writes them.
    """
    keys, values = entries
    size, narrow, count = keys.shape[-1], values.shape[-1], rows.mask.shape[2]
    asking = rows.gathered(queries, keys.shape[1])
    values = pad(values, (0, size - narrow)) if narrow < size else values
    asking = asking.expand(keys.shape[0], -1, -1, -1)
    if keys.device.type == "cpu":
        attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            asking, keys, values, 0.0, False, attn_mask=rows.mask, scale=scaling
        )
        return sums.transpose(1, 2), attended.transpose(1, 2)
    # The only kernel that takes a mask and is chosen by the size of heads, not by the number of rows (`cutlassF.h`).
    mask = rows.mask.expand(-1, keys.shape[1], -1, -1)
    attended, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        asking, keys, values, mask, True, scale=scaling
    )
    return sums[..., :count].transpose(1, 2), attended.transpose(1, 2)  # the kernel pads the sums


def _in_order(read: _OwnReads, sums: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the log-sum-exps and results of groups into the order of the query rows over shared blocks."""
    levels, (key_heads, size) = 1 if read.is_missing is None else read.is_missing.shape[0], states.shape[-2:]
    states = states.reshape(-1, size).index_select(0, read.places).view(levels, -1, key_heads, size)
    sums = sums.reshape(-1).index_select(0, read.places).view(levels, -1, key_heads)
    return sums if read.is_missing is None else sums.masked_fill(read.is_missing, torch.finfo(sums.dtype).min), states


def _widened(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the parts `[blocks, ...]` in float64."""
    if len(parts) == 1:
        return parts[0].double()
    joined = parts[0].new_empty(sum(part.shape[0] for part in parts), *parts[0].shape[1:], dtype=torch.float64)
    start = 0
    for part in parts:
        joined[start : start + part.shape[0]] = part
        start += part.shape[0]
    return joined


def _weights(sums: Tensor, sinks: Tensor | None, sharing: int) -> Tensor:
    """Compute each block's weight, in float64, from the log-sum-exps of its scores, `[blocks, rows, b * kv heads]`."""
    if sinks is None:
        return sums.softmax(dim=0, dtype=torch.float64)
    _, count, key_heads = sums.shape
    own = sinks.double().view(-1, sharing).t()[torch.arange(count, device=sums.device) % sharing]  # [rows, kv heads]
    own = own.repeat(1, key_heads // own.shape[1])
    return torch.cat([sums.double(), own[None]]).softmax(dim=0)[:-1]


AttentionInterface.register(INVARIANT, invariant_attention)
AttentionMaskInterface.register(INVARIANT, sdpa_mask)


@contextmanager
def use_invariant_attention(target: PreTrainedModel) -> Iterator[None]:
    """Let the target use `invariant_attention` inside a `with` block, which one thread at a time may enter."""
    # The rank overrides other threads' `use_gqa_attention`, which does not accept `BlockReads`.
    with lent.holding(Change(target.config.get_text_config(), "_attn_implementation", lambda own: INVARIANT, rank=1)):
        yield
