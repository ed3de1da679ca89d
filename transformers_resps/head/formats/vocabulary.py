"""The draft vocabulary: which target ids a head can propose."""

import torch
from torch import Tensor


def draft_offsets(tensors: dict[str, Tensor], rows: int, vocab_size: int, source: str) -> Tensor | None:
    """Offsets `d2t` `[d]` (the target id of draft id i is i + d2t[i]), or `None` when all tokens can be proposed.

    Published as the offsets `d2t`, as absolute ids `hot_token_id` (SGLang), or as the mask `t2d` `[v]`. A `d2t` that
    holds absolute ids is recognised by its `t2d`.

    Args:
        tensors: under our names.
        rows: rows of the output head, d.
        vocab_size: the target's, v.
        source: where from, for messages.

    Raises:
        ValueError: ids leave the vocabulary, are not ascending, contradict `t2d`, or are missing although d < v.
    """
    order = torch.arange(rows)
    allowed = _allowed(tensors, rows, vocab_size, source)
    if "hot_token_id" in tensors:
        ids = whole_numbers(tensors["hot_token_id"], source)
    elif "d2t" in tensors:
        d2t = whole_numbers(tensors["d2t"], source)
        is_absolute = allowed is not None and torch.equal(d2t, allowed)
        ids = d2t if is_absolute else order + d2t
    elif allowed is not None:
        ids = allowed
    elif rows == vocab_size:
        return None
    else:
        raise ValueError(
            f"{source} can propose {rows} of {vocab_size} tokens, but holds neither `d2t` nor `t2d` to say which. "
            "Download the head again."
        )
    check_ids(ids, vocab_size, source)
    if allowed is not None and not torch.equal(ids, allowed):
        raise ValueError(
            f"The `d2t` and `t2d` of {source} name different draft vocabularies. Download the head again."
        )
    return None if rows == vocab_size else ids - order


def check_ids(ids: Tensor, vocab_size: int, source: str) -> None:
    """Refuse target ids `[d]` that leave the vocabulary or are not strictly ascending.

    Raises:
        ValueError: they do.
    """
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"The `d2t` of {source} leaves the vocabulary: draft id + offset gives {int(outside[0])}, but target ids "
            f"go from 0 to {vocab_size - 1}. Download the head again, or load it with the target it was made for."
        )
    if bool((ids.diff() <= 0).any()):
        raise ValueError(
            f"The `d2t` of {source} gives target ids (draft id + offset) that are not strictly ascending. "
            "Download the head again."
        )


def _allowed(tensors: dict[str, Tensor], rows: int, vocab_size: int, source: str) -> Tensor | None:
    """Ascending ids that `t2d` allows."""
    if "t2d" not in tensors:
        return None
    mask = tensors["t2d"]
    ids = mask.bool().nonzero().squeeze(-1) if mask.dim() == 1 else mask.new_zeros(0)
    if len(mask) != vocab_size or len(ids) != rows:
        raise ValueError(
            f"The `t2d` of {source} has shape {list(mask.shape)} and allows {len(ids)} tokens, but the head proposes "
            f"{rows} of {vocab_size}. Download the head again."
        )
    return ids


def whole_numbers(ids: Tensor, source: str) -> Tensor:
    """`[d]` as int64.

    Raises:
        ValueError: they are not a list of integers.
    """
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{source} stores draft vocabulary ids as {ids.dtype} of shape {list(ids.shape)}, but they must be a "
            "list of integers. Download the head again."
        )
    return ids.long()
