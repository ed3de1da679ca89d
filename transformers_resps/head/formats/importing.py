"""One published checkpoint -> the config and tensors of our canonical head."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration import DraftHeadConfig
from ..identity import target_identity
from .checkpoint import Checkpoint
from .conventions import feature_layers, norm_flags, published_layer_ids, rope_parameters
from .publishers import Publisher, flat_config, publisher_of, target_name
from .shapes import feature_count, read_sizes
from .tensor_names import canonical_names, check_complete
from .unsupported import check_is_eagle3
from .vocabulary import draft_offsets


_COPIED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "initializer_range": 0.02}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Corrections of what publishers write and our own config says otherwise, or not at all.
PUBLISHED_ONLY = {"rope_theta", "sliding_window"}


def canonical_head(
    checkpoint: Checkpoint, target: PreTrainedModel | None, overrides: dict[str, Any]
) -> tuple[DraftHeadConfig, dict[str, Tensor]]:
    """Config and tensors of the canonical head in `checkpoint`, from any publisher.

    Args:
        checkpoint: what was read.
        target: the model the head is for; gives what the config leaves out.
        overrides: corrections, by field of `DraftHeadConfig`, `rope_theta`, and `sliding_window` as `None`.

    Raises:
        ValueError: it is no EAGLE-3 head, contradicts itself, or does not fit the target.
    """
    ours = {key: value for key, value in overrides.items() if key not in PUBLISHED_ONLY}
    if checkpoint.is_canonical:
        fields = checkpoint.config | ours
        if overrides.get("rope_theta") is not None:
            rope = fields.get("rope_parameters") or {"rope_type": "default"}
            fields["rope_parameters"] = {**rope, "rope_theta": float(overrides["rope_theta"])}
        return DraftHeadConfig.from_dict(fields), checkpoint.tensors
    tensors = canonical_names(checkpoint.tensors, checkpoint.name)
    publisher = publisher_of(checkpoint.config, tensors)
    stated = flat_config(checkpoint.config) | overrides
    config = {key: value for key, value in stated.items() if value is not None}
    check_is_eagle3(config, tensors, checkpoint.name)
    check_complete(tensors, checkpoint.name)
    _check_window(config, target, checkpoint.name)
    fields = _fields(config, publisher, tensors, target, overrides, checkpoint.name)
    tensors = _shared_with_target(fields, tensors, config, target, checkpoint.name)
    return DraftHeadConfig(**fields | ours), tensors


def _fields(
    config: dict[str, Any],
    publisher: Publisher,
    tensors: dict[str, Tensor],
    target: PreTrainedModel | None,
    overrides: dict[str, Any],
    source: str,
) -> dict[str, Any]:
    sizes = read_sizes(config, tensors, target, source)
    identity = _identity(config, target)
    _, ids = published_layer_ids(config)
    width = tensors["fc.weight"].shape[1]
    if target is None and "target_hidden_size" not in config and ids is not None and width % len(ids) == 0:
        sizes["target_hidden_size"] = width // len(ids)
    count = feature_count(tensors, sizes["target_hidden_size"], source)
    return {
        **{key: config.get(key, default) for key, default in _COPIED.items()},
        **{key: config.get(key) for key in _TOKEN_IDS},
        **sizes,
        **norm_flags(config, publisher, source),
        "rope_parameters": rope_parameters(config, publisher, overrides),
        "feature_layers": feature_layers(config, publisher, count, identity.get("num_hidden_layers"), source),
        "target": identity,
        "source": {"format": str(publisher), "layer_ids": ids},
    }


def _check_window(config: dict[str, Any], target: PreTrainedModel | None, source: str) -> None:
    """Draft trees see the whole prefix: a window must be as long as the target's longest sequence, or be ignored."""
    window = config.get("sliding_window")
    layers = config.get("layer_types", ["sliding_attention"])
    if not window or not config.get("use_sliding_window", True) or "sliding_attention" not in layers:
        return
    longest = getattr(target.config.get_text_config(), "max_position_embeddings", None) if target else None
    if longest is None or longest > window:
        raise ValueError(
            f"The layers of {source} see the last {window} tokens only (`sliding_window`), but the target reads "
            f"{longest or 'more'} and draft trees support no window. Use a head without one, or pass "
            "`sliding_window=None` to ignore it: the output stays the same, but acceptance may drop after "
            f"{window} tokens."
        )


def _identity(config: dict[str, Any], target: PreTrainedModel | None) -> dict[str, Any]:
    """The given target's identity, or what the config says about it."""
    layer_count = config.get("num_target_layers")
    if target is None:
        told = {"name_or_path": target_name(config), "num_hidden_layers": layer_count}
        return {key: value for key, value in told.items() if value is not None}
    identity = target_identity(target)
    if layer_count is not None and layer_count != identity["num_hidden_layers"]:
        raise ValueError(
            f"The head was made for a target of {layer_count} layers, but this target has "
            f"{identity['num_hidden_layers']}. Load the head that was made for this target."
        )
    return identity


def _shared_with_target(
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    target: PreTrainedModel | None,
    source: str,
) -> dict[str, Tensor]:
    """Leave out the tensors that the head borrows from its target, and set in `fields` what it keeps."""
    offsets = draft_offsets(tensors, fields["draft_vocab_size"], fields["vocab_size"], source)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ("t2d", "d2t", "hot_token_id")}
    if offsets is None:
        fields["draft_vocab_size"] = None
    else:
        tensors["d2t"] = offsets
    same_width = fields["hidden_size"] == fields["target_hidden_size"]
    is_trained = config.get("owns_embedding") or config.get("embed_requires_grad")
    fields["owns_embedding"] = not same_width or bool(is_trained)
    if not fields["owns_embedding"]:
        tensors.pop("embed_tokens.weight", None)  # the target's own, or a stale copy of it
    if "lm_head.weight" not in tensors:
        borrowed = offsets is None and same_width
    else:
        borrowed = config.get("owns_output_head") is False or _is_targets_output(tensors["lm_head.weight"], target)
    if borrowed:
        tensors.pop("lm_head.weight", None)
    fields["owns_output_head"] = not borrowed
    return tensors


def _is_targets_output(weight: Tensor, target: PreTrainedModel | None) -> bool:
    output = None if target is None else target.get_output_embeddings()
    if output is None or weight.shape != output.weight.shape:
        return False
    return torch.equal(weight, output.weight.detach().to(device="cpu", dtype=weight.dtype))
