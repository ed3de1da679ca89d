"""The target's attention over trees: SDPA that reads shared keys once for all query heads that share them (GQA).

With a mask, Transformers' `sdpa` copies shared keys and values for every query head, at every layer; PyTorch's
`enable_gqa` reads them once for each query head. Here such heads become queries of one head, with the same result up
to rounding. Single tokens gain most: one layer of SmolLM2 in bfloat16 on Zen 4 takes 0.12 ms instead of 0.59 after 800
positions, three nodes in each of eight rows 0.36 ms instead of 0.55 after 250 positions. Not timed on accelerators.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compilation.native import attends_natively, bf16_attention
from .lending import Change, lent
from .masks import additive


STOCK, GROUPED = "sdpa", "resps_grouped_sdpa"  # names of Transformers' attention implementation and of ours
# Each row of a mask begins at a multiple of this number of elements. PyTorch's memory-efficient kernel needs 8, in
# older releases 16, and copies any other mask (`preprocess_mask` in ATen's `attention.cpp`).
_ALIGNMENT = 16
_OF_SDPA_ALONE = ("softcap", "position_bias")  # options that change the result, and that `attend` does not support


class PackedNodes:
    """Packs r nodes of several rows into one row, so that a forward computes only these nodes, and no padding.

    `places` `[r]` are the packed nodes' indices among the `b * n` nodes of all rows; `are_computed` is their mask.
    """

    def __init__(self, places: Tensor, rows: int, count: int) -> None:
        self._places, self._size = places, (rows, count)
        order = torch.arange(places.shape[0], device=places.device)  # `len` would compile this size as a constant
        self._orders = places.new_zeros(rows * count).scatter(0, places, order)
        of_all = torch.zeros(rows * count, dtype=torch.bool, device=places.device)
        self.are_computed = of_all.scatter(0, places, True).view(rows, count)

    def together(self, states: Tensor) -> Tensor:
        """Pick the packed nodes: `[b, n, ...]` -> `[1, r, ...]`."""
        return states.flatten(0, 1).index_select(0, self._places)[None]

    def apart(self, states: Tensor) -> Tensor:
        """Move packed nodes back to their rows: `[1, r, ...]` -> `[b, n, ...]`; other nodes get arbitrary values."""
        return states[0].index_select(0, self._orders).view(*self._size, *states.shape[2:])


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    resps_packed: "PackedNodes | None" = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute the same as Transformers' `sdpa`, by `attend` where `attend` is faster; for shapes see `attend`.

    An `attention_mask` of `None` means causal. With `resps_packed` the query `[1, heads, r, hd]` holds the r packed
    nodes of all rows, while keys and mask still have b rows. Returns `[b, q, heads, hd]`, and `None` for the weights.
    """
    if resps_packed is not None:
        whole = resps_packed.apart(query.transpose(1, 2)).transpose(1, 2)
        attended, _ = grouped_attention(module, whole, key, value, attention_mask, dropout, scaling, **options)
        return resps_packed.together(attended), None
    shares = query.shape[1] != key.shape[1]
    odd = any(options.get(name) is not None for name in _OF_SDPA_ALONE)
    causal = attention_mask is None and query.shape[2] > 1  # `attend` cannot: it turns heads into queries
    is_ours = shares or attends_natively(query, key, value, attention_mask)
    if not is_ours or odd or causal or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    return attend(query, key, value, attention_mask, dropout, scaling).transpose(1, 2).contiguous(), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None
) -> Tensor:
    """Compute SDPA; heads that share keys become queries of one head. Returns `[b, heads, q, hd]`, like the query.

    `key` and `value` are `[b, kv heads, t, hd]`. `mask` is bool or additive, `[b or 1, 1 or heads per kv head, q, t]`;
    a mask for 1 head is used for all heads, and `None` hides nothing. `scaling` is `hd ** -0.5` when `None`.
    """
    if not dropout and attends_natively(query, key, value, mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if mask is not None and mask.dtype is torch.bool:
            mask = additive(mask, query.dtype)
        attended: Tensor = bf16_attention(query, key, value, mask, scale)
        return attended.transpose(1, 2)
    batch_size, heads, count = query.shape[:3]
    sharing = heads // key.shape[1]
    if mask is not None and sharing > 1 and max(count, mask.shape[1]) > 1:
        mask = stacked(mask, sharing, 1 if mask.device.type == "cpu" else _ALIGNMENT)
    query = query.reshape(batch_size, key.shape[1], sharing * count, -1)
    by_kernel = functional.scaled_dot_product_attention
    attended = by_kernel(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return attended.reshape(batch_size, heads, count, -1)


def stacked(mask: Tensor, sharing: int, alignment: int) -> Tensor:
    """Stack the masks `[b, 1 or sharing, q, t]` of query heads that share a key head: `[b, 1, sharing * q, t]`.

    `sharing` is the number of these heads. If the masks are copied, rows begin at multiples of `alignment` elements.
    """
    rows, copies, count, length = mask.shape
    if copies < sharing and length % alignment:
        padded = mask.new_empty(rows, sharing, count, -(-length // alignment) * alignment)
        mask = padded[..., :length].copy_(mask)
    return mask.expand(-1, sharing, -1, -1).flatten(1, 2)[:, None]


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def use_gqa_attention(target: PreTrainedModel) -> Iterator[None]:
    """Let a target with `sdpa` attention use `grouped_attention` inside the `with` block.

    At each forward, layers look up their attention's name in the config. The name is changed only for forwards over
    trees, so that prompts, and other users of the target, get exactly `sdpa`. Other threads that run the target may
    see either name; results are equal up to rounding. With FlashAttention, `_flash_or_tree` selects one by the mask.
    """
    config = target.config.get_text_config()
    name = config._attn_implementation
    function: Any = ALL_ATTENTION_FUNCTIONS[name] if is_flash(name) else None
    if function is not None and getattr(function, "func", None) is not _flash_or_tree:
        AttentionInterface.register(name, partial(_flash_or_tree, function))
    with lent.holding(Change(config, "_attn_implementation", lambda own: GROUPED if own == STOCK else own)):
        yield


def is_flash(attention: str) -> bool:
    """Whether `attention` names a FlashAttention implementation, of any release or from the Hub."""
    return "flash" in attention and not attention.startswith("paged|")


def _flash_or_tree(
    flash: Callable[..., Any],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **options: Any,
) -> Any:
    """Run `grouped_attention` if the mask has 4 dimensions, as for trees; else run `flash`, whose masks have 2."""
    takes = flash if attention_mask is None or attention_mask.dim() < 4 else grouped_attention
    return takes(module, query, key, value, attention_mask, *args, **options)
