"""A target and its head as JSON values, by which whoever was trained for the two knows them again.

Knows models and heads: nothing of who keeps these values.
"""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from .identity import target_identity
from .modeling import DraftHead


def pair_identity(target: PreTrainedModel, head: DraftHead | None) -> dict[str, dict[str, Any]]:
    """`target`: its name and sizes; and where there is one, `head`: its name, sizes and, unless it is in float16,
    fingerprint.
    """
    identity = {"target": target_identity(target)}
    if head is not None:
        sizes = ("feature_layers", "hidden_size", "num_hidden_layers", "vocab_size", "draft_vocab_size")
        identity["head"] = {
            "name_or_path": head.config.name_or_path,
            **{size: getattr(head.config, size) for size in sizes},
        }
        if head.dtype != torch.float16:  # which loses the last bits of small weights: it would be another one there
            identity["head"]["fingerprint"] = head_fingerprint(head)
    return identity


def head_fingerprint(head: DraftHead) -> str:
    """A hash of what reads the features (`fc`): changes when a head is trained further, and is the same in float32 and
    bfloat16, however the head was saved.
    """
    weight = head.fc.weight.detach()
    version = (weight.data_ptr(), None if weight.is_inference() else weight._version)
    kept: tuple[Any, str] | None = head.__dict__.get("_fingerprint")
    if kept is None or kept[0] != version or version[1] is None:
        raw = weight.to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
        kept = head.__dict__["_fingerprint"] = (version, hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16])
    return kept[1]
