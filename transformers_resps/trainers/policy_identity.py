"""Whom a policy is trained for. Knows models and heads: nothing of how a policy is trained."""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from ..head import DraftHead
from ..head.identity import target_identity


def policy_identity(target: PreTrainedModel, head: DraftHead) -> dict[str, dict[str, Any]]:
    """`target` and `head` as `ReSpSConfig` keeps them and `ReSpSPolicy.check_identity` compares them."""
    sizes = ("feature_layers", "hidden_size", "num_hidden_layers", "vocab_size", "draft_vocab_size")
    return {
        "target": target_identity(target),
        "head": {
            "name_or_path": head.config.name_or_path,
            **{size: getattr(head.config, size) for size in sizes},
            "fingerprint": head_fingerprint(head),
        },
    }


def head_fingerprint(head: DraftHead) -> str:
    """Changes when a head is trained further; the same in every dtype that a head is saved or loaded in."""
    weight = head.fc.weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]
