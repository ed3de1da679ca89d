"""The identity of a target and its head as JSON values: a policy trained for the two recognises them by it.

Knows models and heads: nothing of policies.
"""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from .identity import target_identity
from .modeling import DraftHead


def pair_identity(target: PreTrainedModel, head: DraftHead | None) -> dict[str, dict[str, Any]]:
    """Identify a target and its head, so that what was trained for them can be checked against others.

    Args:
        target: the loaded model.
        head: its draft head; `None` if there is none.

    Returns:
        `target`: its name and sizes. With a head also `head`: its name, its sizes and, unless it is in float16, its
        `fingerprint`.
    """
    identity = {"target": target_identity(target)}
    if head is not None:
        sizes = ("feature_layers", "hidden_size", "num_hidden_layers", "vocab_size", "draft_vocab_size")
        identity["head"] = {
            "name_or_path": head.config.name_or_path,
            **{size: getattr(head.config, size) for size in sizes},
        }
        if head.dtype != torch.float16:  # float16 loses the last bits of small weights: the hash would differ
            identity["head"]["fingerprint"] = head_fingerprint(head)
    return identity


def head_fingerprint(head: DraftHead) -> str:
    """Hash the weights that read the features (`fc`): 16 hexadecimal digits.

    The hash changes when the head is trained further. It is the same in float32 and bfloat16, however the head was
    saved.
    """
    weight = head.fc.weight.detach()
    version = (weight.data_ptr(), None if weight.is_inference() else weight._version)
    kept: tuple[Any, str] | None = head.__dict__.get("_fingerprint")
    if kept is None or kept[0] != version or version[1] is None:
        raw = weight.to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
        kept = head.__dict__["_fingerprint"] = (version, hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16])
    return kept[1]
