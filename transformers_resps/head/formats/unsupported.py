"""The errors for draft models that are not EAGLE-3 heads, and for kinds of heads that are not supported."""

from typing import Any

from torch import Tensor

from .publishers import MODELOPT_LAYER


_WAY_OUT = "Use an EAGLE-3 head of the same target, or train one with training/train_head.py."


def check_is_eagle3(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> None:
    """Refuse a drafter that would load but draft nonsense, or not load at all.

    Args:
        config: the published config, flat.
        tensors: under our names.
        source: where from, for messages.

    Raises:
        ValueError: says which kind of drafter this is and why it cannot be used.
    """
    reason = _another_kind(config, tensors) or _another_layer(config) or _not_two_inputs(tensors)
    if reason:
        raise ValueError(f"{source} {reason} {_WAY_OUT}")


def _another_kind(config: dict[str, Any], tensors: dict[str, Tensor]) -> str | None:
    if (
        any("mask_hidden" in name or "parallel_draft_heads" in name for name in tensors)
        or config.get("parallel_drafting")
        or config.get("speculators_model_type") == "peagle"
        or any(name.startswith("PEagle") for name in config.get("architectures", []))
        or config.get("parallel_draft_step", 1) > 1
    ):
        return (
            "is a P-EAGLE (parallel) head: it drafts several tokens in one pass, but draft trees grow level by level."
        )
    kind = config.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        return f"is a speculators model of the kind {kind!r}, but only `eagle3` is an EAGLE-3 head."
    if any(part in name for name in tensors for part in ("kv_a_proj", "kv_b_proj", "q_a_proj", "q_b_proj")):
        return "has MLA attention (low-rank keys and values), but only multi-head and grouped-query are supported."
    if any(".mlp.experts." in name or name.endswith(".mlp.gate.weight") for name in tensors):
        return "has a mixture of experts in its layer, but only a dense MLP is supported."
    return None


def _another_layer(config: dict[str, Any]) -> str | None:
    if config.get("use_aux_hidden_state") is False:
        return (
            "has `use_aux_hidden_state: false`: it reads the target's last hidden state, but EAGLE-3 reads those of "
            "several layers."
        )
    for flag, needed in MODELOPT_LAYER.items():
        if config.get(flag, needed) != needed:
            return f"has `{flag}: {str(not needed).lower()}`, but EAGLE-3's layer needs {str(needed).lower()}."
    return None


def _not_two_inputs(tensors: dict[str, Tensor]) -> str | None:
    fc, query = tensors.get("fc.weight"), tensors.get("layers.0.self_attn.q_proj.weight")
    if fc is None or query is None or query.shape[1] == 2 * fc.shape[0]:
        return None  # what is missing is reported with everything else that is
    width = fc.shape[0]
    if query.shape[1] == width and fc.shape[1] == 2 * width:
        return (
            f"is an EAGLE-1 or EAGLE-2 head: its fc joins embedding and feature ({fc.shape[1]} -> {width}) and its "
            f"q_proj reads {width} columns, but EAGLE-3's reads {2 * width}."
        )
    return (
        f"is no EAGLE-3 head: its q_proj reads {query.shape[1]} columns, but EAGLE-3's reads {2 * width}, embedding "
        "and feature side by side."
    )
