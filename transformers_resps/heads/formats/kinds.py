"""Which class reads a checkpoint: told by its tensors as published, since configs state little."""

from collections.abc import Mapping
from typing import Any

from ..config import BlockHeadConfig, DraftHeadConfig


_SAVED_BY_US = {
    DraftHeadConfig.model_type: "DraftHead",
    BlockHeadConfig.model_type: "BlockHead",
    "resps_mtp": "MtpHead",
}
_PREFIXES = ("mtp_dspark.", "model.", "draft_model.")
SHAPING = ("fc.weight", "layers.0.self_attn.q_proj.weight")  # tensors whose shapes tell, by the ends of their names
# Beginnings of names that tensors of block heads alone have.
_OF_BLOCKS = ("prefix_gru.", "logit_head.prefix_gru.", "markov_head.", "candidate_selector.", "encoder.fc.")


def raw_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same under names without prefixes, and without what a config or the target tells."""
    found = {}
    for name, tensor in tensors.items():
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if not name.startswith("verifier_") and not name.endswith("rotary_emb.inv_freq"):
            found[name] = tensor
    return found


def class_of(config: dict[str, Any], tensors: Mapping[str, Any]) -> str:
    """The class for a checkpoint of a head: "BlockHead" also for one that cannot be read, "DraftHead" for all others.

    Of the tensors only the names count, and the shapes of those that end as `SHAPING`. A block head fuses features as
    EAGLE-3's does, but norms them at the top, and no layer of it reads embedding and feature side by side.
    """
    saved = _SAVED_BY_US.get(config.get("model_type", ""))
    if saved is not None:
        return saved
    names = raw_names(tensors)
    fused, query = (names.get(name) for name in SHAPING)
    is_wide = fused is not None and query is not None and query.shape[1] == 2 * fused.shape[0]
    if is_wide or any("mask_hidden" in name for name in names) or "layers.0.hidden_norm.weight" in names:
        return "DraftHead"
    fills_blocks = "hidden_norm.weight" in names or any(name.startswith(_OF_BLOCKS) for name in names)
    return "BlockHead" if fills_blocks else "DraftHead"


def check_class(source: str, config: dict[str, Any], tensors: Mapping[str, Any], wanted: str) -> None:
    """Raise a `ValueError` for a checkpoint that another class reads; it names that."""
    found = class_of(config, tensors)
    if found != wanted:
        raise ValueError(
            f"{source} is no `{wanted}`, but one for `{found}`. Load it with `{found}.from_pretrained`, or any kind "
            "with `AutoDraftHead.from_pretrained`."
        )
