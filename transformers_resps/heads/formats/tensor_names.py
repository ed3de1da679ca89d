"""Rename published tensors to this package's names, and check that a head has all of its tensors."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor


Item = TypeVar("Item")

_PREFIXES = ("model.", "draft_model.", "eagle_module.")
_SPELLINGS = (
    ("midlayer.", "layers.0."),
    ("hidden_norm.", "layers.0.hidden_norm."),
    ("input_embeds_norm.", "layers.0.input_layernorm."),
    ("layers.0.input_embeds_norm.", "layers.0.input_layernorm."),
    ("eagle_lm_head.", "lm_head."),
    ("draft_id_to_target_id", "d2t"),
)
# Names of tensors that are ignored: computed from the config, or copies of the target's tensors.
_IGNORED_STARTS = ("verifier_",)
_IGNORED_ENDS = ("rotary_emb.inv_freq", ".cos_cached", ".sin_cached")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LAYER = (
    *("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *(f"self_attn.{name}_proj" for name in "qkvo"),
)


def canonical_names(tensors: Mapping[str, Item], source: str) -> dict[str, Item]:
    """Return `tensors` with this package's names as keys, instead of published names. `t2d` and `hot_token_id` are
    kept, although this package's heads do not have them. Raises a `ValueError` if two tensors get the same name.
    """
    renamed: dict[str, Item] = {}
    origins: dict[str, str] = {}
    for name, tensor in tensors.items():
        canonical = _canonical(name)
        if canonical is None:
            continue
        if canonical in renamed:
            raise ValueError(
                f"{source} has both {origins[canonical]} and {name}, which mean the same tensor ({canonical}). "
                "Remove the one that the head was not trained with."
            )
        renamed[canonical], origins[canonical] = tensor, name
    return renamed


def _canonical(name: str) -> str | None:
    if name.startswith(_IGNORED_STARTS) or name.endswith(_IGNORED_ENDS):
        return None
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    for theirs, ours in _SPELLINGS:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def layer_count(tensors: dict[str, Tensor]) -> int:
    """Count a head's decoder layers: the highest layer index in a tensor name, plus one."""
    return 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("layers.")), default=0)


def check_complete(tensors: dict[str, Tensor], source: str) -> None:
    """Raise a `ValueError` if a tensor is missing that every EAGLE-3 head has."""
    layers = range(layer_count(tensors))
    required = ["fc.weight", "norm.weight", "layers.0.hidden_norm.weight"]
    required += [f"layers.{index}.{part}.weight" for index in layers for part in _LAYER]
    missing = [name for name in required if name not in tensors]
    if missing:
        raise ValueError(_inexact(source, missing, []))


def check_exact(wanted: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Raise a `ValueError` if names or shapes of `tensors` differ from those of `wanted`, or a tensor is quantized."""
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        raise ValueError(_inexact(source, missing, unexpected))
    wrong = [
        f"{name} {list(tensor.shape)} (needed: {list(wanted[name].shape)})"
        for name, tensor in tensors.items()
        if tensor.shape != wanted[name].shape
    ]
    if wrong:
        raise ValueError(
            f"The tensors of {source} do not have the sizes that its config states: {', '.join(wrong)}. "
            "Correct config.json, or pass the right value to `from_pretrained`."
        )
    strange = sorted(name for name, tensor in tensors.items() if name != "d2t" and tensor.dtype not in _FLOATS)
    if strange:
        raise ValueError(
            f"{source} stores {strange[0]} as {tensors[strange[0]].dtype}, but heads are read in float32, bfloat16, "
            "float16 or float64. Use the unquantized head."
        )


def _inexact(source: str, missing: list[str], unexpected: list[str]) -> str:
    found = [f"{kind} {names}" for kind, names in (("lacks", missing), ("has the unexpected", unexpected)) if names]
    return (
        f"{source} {' and '.join(found)}, but nothing is newly initialized or left out. "
        "Download it again, or use a head in one of the known layouts."
    )
