"""Create an untrained head for a target: its draft vocabulary, its config, and its initial weights."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import output_layer, text_config
from ..verifying.forward import decoder_layers
from .config import CORRECTIONS, ROPE_BASE, default_feature_layers, default_layer_ids
from .identity import check_is_model, target_identity


Head = TypeVar("Head", bound=PreTrainedModel)


def draft_vocabulary(target: PreTrainedModel, size: int | None, ids: Tensor | Sequence[int] | None) -> Tensor | None:
    """Check and sort the target `ids` of a draft vocabulary, `[d]`. Without `ids`, return the lowest `size` ids; with
    neither, return `None`: the head can propose all tokens. Raises a `ValueError` if `size` or `ids` are invalid.
    """
    check_is_model(target)
    vocab_size = text_config(target).vocab_size
    if size is not None and not (isinstance(size, int) and 1 <= size <= vocab_size):
        raise ValueError(
            f"`draft_vocab_size` is {size!r}, but the target has {vocab_size} tokens. "
            f"Pass a number from 1 to {vocab_size}, or None for all of them."
        )
    if ids is None:
        return None if size is None else torch.arange(size)
    ordered = torch.as_tensor(ids).cpu().sort().values
    if ordered.dim() != 1 or not len(ordered) or ordered.is_floating_point() or ordered.dtype == torch.bool:
        raise ValueError(
            f"`draft_token_ids` is {ordered.dtype} of shape {list(ordered.shape)}, but must be a list or tensor `[d]` "
            "of integers, at least one. Pass target ids, or None for the lowest `draft_vocab_size`."
        )
    distinct = len(ordered.unique())
    if distinct != len(ordered) or size not in (None, len(ordered)):
        raise ValueError(
            f"`draft_token_ids` has {len(ordered)} ids, {distinct} of them distinct, but `draft_vocab_size` is "
            f"{size}. Pass distinct ids, as many as `draft_vocab_size`, or leave `draft_vocab_size` out."
        )
    if ordered[0] < 0 or ordered[-1] >= vocab_size:
        raise ValueError(
            f"`draft_token_ids` go from {int(ordered[0])} to {int(ordered[-1])}, but the target's ids go from 0 to "
            f"{vocab_size - 1}. Pass ids of the target's own tokenizer."
        )
    return ordered.long()


@torch.no_grad()
def fresh_head(kind: type[Head], target: PreTrainedModel, rows: Tensor | None, fields: dict[str, Any]) -> Head:
    """Create an untrained head of class `kind` whose config has these `fields`; `rows` is its `draft_vocabulary`. To
    train faster, it begins with an `fc` that copies the deepest feature, and with the target's norm and output rows.
    """
    head: Any = kind(_config(kind, target, None if rows is None else len(rows), fields))
    head.to(device=target.device, dtype=target.dtype)
    width, output = head.config.hidden_size, output_layer(target)
    if width == text_config(target).hidden_size:
        head.fc.weight[:, -width:] += torch.eye(width, dtype=head.dtype, device=head.device)
    if rows is not None:
        head.d2t.copy_(rows - torch.arange(len(rows)))
    if output is not None and output.weight.shape[-1] == width:
        if head.config.owns_output_head:
            head.lm_head.weight.copy_(output.weight if rows is None else output.weight[rows.to(output.weight.device)])
        if (norm := _plain_norm(target)) is not None:
            head.norm.weight.copy_(norm)
    return cast(Head, head)


def _config(kind: type[Head], target: PreTrainedModel, draft_vocab_size: int | None, fields: dict[str, Any]) -> Any:
    """Make a head's config for `target` from defaults and `fields`. Raises a `ValueError` if they do not fit."""
    where, of = f"{kind.__name__}.from_target", cast(Any, kind.config_class)
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"{where} got a {type(target).__name__}, which is an encoder-decoder, but a head needs a decoder-only "
            "target. Call `generate` with `policy='auto'` and without a head: it drafts from the source and the text."
        )
    unknown = sorted(set(fields) - set(of.field_types()))
    if unknown:
        raise ValueError(
            f"{where} got {unknown}, which it does not know. Check the spelling: it takes the fields of "
            f"`{of.__name__}`, {sorted(of.field_types())}."
        )
    theirs = _target_sizes(target)
    chosen = {
        "feature_layers": default_feature_layers(theirs["target"]["num_hidden_layers"]),
        "draft_vocab_size": draft_vocab_size,
        "owns_output_head": draft_vocab_size is not None,
    }
    config = of(**{name: theirs[name] for name in theirs if name in of.field_types()} | chosen | fields)
    for came, mend in _misfits(config, theirs):
        raise ValueError(f"{where} got {came}. {mend}.")
    return config


def _plain_norm(target: PreTrainedModel) -> Tensor | None:
    """Return the weight of the target's final norm; `None` if the norm is no RMSNorm or multiplies by 1 + weight."""
    norm: Any = getattr(target.get_decoder(), "norm", None)
    name = type(norm).__name__
    return norm.weight if name.endswith("RMSNorm") and "Gemma" not in name else None  # Gemma multiplies by 1 + weight


def block_fields(target: PreTrainedModel, feature_layers: list[int] | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields `given` for a block head's config, with defaults of a small head for the others."""
    check_is_model(target)
    config = text_config(target)
    depth, theirs = config.num_hidden_layers, getattr(config, "rope_parameters", None) or {}
    spread = {min(max(layer + 1, 0), depth) for layer in default_layer_ids(depth, 5)}
    fields = {
        "feature_layers": feature_layers or sorted(spread),
        "shifted": True,
        "causal": [True] * given.get("num_hidden_layers", 2),
        "correction": "vanilla",
        "mask_token_id": _stated(config, "bos_token_id", config.vocab_size - 1),
        "rope_parameters": {"rope_type": "default", "rope_theta": theirs.get("rope_theta", ROPE_BASE)},
    } | given
    ranked = {"correction_rank": 64} if fields["correction"] in CORRECTIONS[1:] else {}
    return ranked | ({"selector_top_k": 16} if fields["correction"] == "selector" else {}) | fields


@torch.no_grad()
def start_layers(layers: Any, hidden_norm: Any, target: PreTrainedModel) -> None:
    """Copy to each of a head's `layers` those weights of the target's last layers that have the same name and shape.
    Also copy the first layer's input norm to `hidden_norm`, so that the text's keys and values start as in the target.
    """
    if _plain_norm(target) is None:
        return
    theirs: Any = decoder_layers(target)[-len(layers) :]
    for own, other in zip(layers, theirs, strict=False):
        mine, found = own.state_dict(), other.state_dict()
        same = {name: found[name] for name in mine if name in found and found[name].shape == mine[name].shape}
        own.load_state_dict(same, strict=False)
    hidden_norm.load_state_dict(layers[0].input_layernorm.state_dict())


def _misfits(config: Any, theirs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each contradiction among the config's fields or with the target's sizes `theirs`, and its remedy."""
    layers, depth, width = config.feature_layers, theirs["target"]["num_hidden_layers"], theirs["hidden_size"]
    if layers[-1] > depth:
        yield (
            f"the feature layers {layers}, but this target has the hidden states 0 to {depth}",
            "Count them as in `output_hidden_states`, or leave them out",
        )
    if getattr(config, "target_hidden_size", width) != width:
        yield f"`target_hidden_size={config.target_hidden_size}`, but the target's is {width}", "Leave it out"
    if config.vocab_size != theirs["vocab_size"]:
        yield (
            f"`vocab_size={config.vocab_size}`, but the target's is {theirs['vocab_size']}",
            "Leave it out; `draft_vocab_size` is what the head can propose",
        )
    may_differ = hasattr(config, "owns_embedding")
    if config.hidden_size != width and not (may_differ and config.owns_embedding and config.owns_output_head):
        yield (
            f"`hidden_size={config.hidden_size}`, but what it borrows from the target is {width} wide",
            "Leave it out" + ", or pass `owns_embedding=True` and `owns_output_head=True`" * may_differ,
        )


def _stated(config: Any, name: str, otherwise: Any = None) -> Any:
    """Return field `name` of a target's config; `otherwise` if missing, null, or differs by layer as in Gemma 4."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # `AmbiguousGlobalPerLayerAttributeError` of Transformers 5.24
        found = None
    return otherwise if found is None else found


def _target_sizes(target: PreTrainedModel) -> dict[str, Any]:
    """Return the config fields that make a head's layers like the target's layers."""
    config = text_config(target)
    heads = config.num_attention_heads
    head_dim = _stated(config, "head_dim", config.hidden_size // heads)
    return {
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": _stated(config, "intermediate_size", 4 * config.hidden_size),
        "num_attention_heads": heads,
        "num_key_value_heads": _stated(config, "num_key_value_heads", heads),
        "head_dim": head_dim if head_dim % 2 == 0 else head_dim + 1,
        "rms_norm_eps": _stated(config, "rms_norm_eps", 1e-5),
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "target": target_identity(target),
        **{name: _stated(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
