"""SDPA for grouped-query attention: heads that share keys become queries of one head.

With a mask, Transformers' `sdpa` copies keys and values for every head that shares them, at every layer; PyTorch's
`enable_gqa` reads them once for each head. The results are equal up to rounding. A lone token gains most, because
PyTorch spends about as much on one query as on three. One layer of SmolLM2 in bfloat16 on Zen 4
(the study `attention_speed`): a token after 800 positions takes 0.59 ms with `enable_gqa`, as in plain decoding, and
0.12 ms here; three nodes in each of eight rows after 250 positions take 0.70 ms with copies, 0.55 ms with `enable_gqa`
and 0.36 ms here. On accelerators it was not timed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


STOCK, GROUPED = "sdpa", "resps_grouped_sdpa"  # names of attention implementations
# On accelerators PyTorch's memory-efficient kernel takes a mask whose rows begin at multiples of 8 elements, of 16 in
# older releases, and copies any other (`preprocess_mask` in ATen's `attention.cpp`).
_ALIGNMENT = 16
_OF_SDPA_ALONE = ("softcap", "position_bias")  # options that change its result


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' `sdpa`, with a faster way to the same result where it would copy keys.

    Args:
        module: the layer.
        query: `[b, heads, q, hd]`.
        key: `[b, kv heads, t, hd]`.
        value: like `key`.
        attention_mask: `[b or 1, 1, q, t]`; `None` is causal.
        dropout: share of the weights.
        scaling: of the scores.
        options: anything else is `sdpa`'s.

    Returns:
        `[b, q, heads, hd]`, and nothing for the weights.
    """
    shares = query.shape[1] != key.shape[1]
    odd = any(options.get(name) is not None for name in _OF_SDPA_ALONE)
    causal = attention_mask is None and query.shape[2] > 1  # by an argument of `sdpa`, which would count heads as rows
    if not shares or odd or causal or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    return attend(query, key, value, attention_mask, dropout, scaling).transpose(1, 2).contiguous(), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """SDPA in which heads that share keys are queries of one head.

    Args:
        query: `[b, heads, q, hd]`.
        key: `[b, kv heads, t, hd]`.
        value: like `key`.
        mask: `[b or 1, 1, q, t]`, true where attended or added to the scores; `None` sees everything. Where the second
            size is the number of heads that share keys, it is not copied.
        dropout: share of the weights.
        scaling: of the scores; `hd ** -0.5` when `None`.

    Returns:
        `[b, heads, q, hd]`.
    """
    batch_size, heads, count = query.shape[:3]
    sharing = heads // key.shape[1]
    if mask is not None and sharing > 1 and max(count, mask.shape[1]) > 1:
        mask = stacked(mask, sharing, 1 if mask.device.type == "cpu" else _ALIGNMENT)
    query = query.reshape(batch_size, key.shape[1], sharing * count, -1)
    attended = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return attended.reshape(batch_size, heads, count, -1)


def stacked(mask: Tensor, sharing: int, alignment: int) -> Tensor:
    """A mask for each of the heads that share keys.

    Args:
        mask: `[b, 1 or sharing, q, t]`.
        sharing: number of heads.
        alignment: elements, of which each row begins at a multiple if the mask is copied.

    Returns:
        `[b, 1, sharing * q, t]`.
    """
    rows, given, count, length = mask.shape
    if given < sharing:
        padded = mask.new_empty(rows, sharing, count, -(-length // alignment) * alignment)
        mask = padded[..., :length].copy_(mask)
    return mask.flatten(1, 2)[:, None]


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def use_gqa_attention(target: PreTrainedModel) -> Iterator[None]:
    """Inside, `target` attends by `grouped_attention` if it would by `sdpa`.

    A layer asks its config for the name at each forward, so the name changes for the forward over a tree alone:
    prompts, and whoever else runs the target between two steps, attend by `sdpa` bit for bit. Calls in other threads
    may see either name, so both give the same result, up to rounding.
    """
    config = target.config.get_text_config()
    if config._attn_implementation != STOCK:
        yield
        return
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        if config._attn_implementation == GROUPED:  # not if another one was chosen meanwhile
            config._attn_implementation = STOCK
