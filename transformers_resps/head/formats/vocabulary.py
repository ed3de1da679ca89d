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
    allowed = tensors["t2d"].nonzero().squeeze(-1) if "t2d" in tensors else None
    if "hot_token_id" in tensors:
        ids = tensors["hot_token_id"].long()
    elif "d2t" in tensors:
        d2t = tensors["d2t"].long()
        is_absolute = allowed is not None and torch.equal(d2t, allowed)
        ids = d2t if is_absolute else torch.arange(len(d2t)) + d2t
    elif allowed is not None:
        ids = allowed
    elif rows == vocab_size:
        return None
    else:
        raise ValueError(
            f"{source} can propose {rows} of {vocab_size} tokens, but holds neither `d2t` nor `t2d` to say which. "
            "Download the head again."
        )
    if ids.min() < 0 or ids.max() >= vocab_size or bool((ids.diff() <= 0).any()):
        raise ValueError(
            f"The `d2t` of {source} gives target ids from {int(ids.min())} to {int(ids.max())}, but they must ascend "
            f"from 0 to {vocab_size - 1} at most. Download the head again, or load it with the target it was made for."
        )
    if len(ids) != rows or (allowed is not None and not torch.equal(ids, allowed)):
        raise ValueError(
            f"The output head, `d2t` and `t2d` of {source} name different draft vocabularies. Download the head again."
        )
    return None if rows == vocab_size else ids - torch.arange(rows)
