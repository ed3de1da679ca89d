"""Whose layout a checkpoint has, from tensor names first and config second.

What the publishers mean by the same words: layer ids, RoPE, norms.
"""

import logging
from enum import StrEnum
from typing import Any

from torch import Tensor

from ..config import ROPE_BASE, default_feature_layers


class Publisher(StrEnum):
    """Who wrote the file; each has its own conventions (see `conventions`)."""

    EAGLE = "eagle"
    SPECFORGE = "specforge"
    ANGELSLIM = "angelslim"
    MODELOPT = "modelopt"
    SPECULATORS = "speculators"
    DEEPSPEC = "deepspec"


# What NVIDIA's ModelOpt can leave out of a head's layer or add to it, and what EAGLE-3's layer has.
MODELOPT_LAYER = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False}


def publisher_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Publisher:
    """Recognise the publisher.

    Args:
        config: `config.json` as published.
        tensors: under our names; only the names count.
    """
    architectures = config.get("architectures") or []
    if {"speculators_model_type", "transformer_layer_config"} & set(config):
        return Publisher.SPECULATORS
    is_full = "d2t" not in tensors and "layers.0.self_attn.q_norm.weight" in tensors
    if is_full and "target_layer_ids" in config:
        return Publisher.DEEPSPEC
    if "Eagle3LlamaForCausalLM" in architectures or "modal_type" in config:
        return Publisher.ANGELSLIM
    eagle = config.get("eagle_config")
    if MODELOPT_LAYER.keys() & (eagle or {}):
        return Publisher.MODELOPT
    if eagle is not None or "LlamaForCausalLMEagle3" in architectures:
        return Publisher.SPECFORGE
    return Publisher.EAGLE


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """What the config states, with speculators' `transformer_layer_config` and others' `eagle_config` at the top.

    A field that is null counts as left out.
    """
    nested = (config.get("transformer_layer_config") or {}, config.get("eagle_config") or {})
    return {key: value for part in (*nested, config) for key, value in part.items() if value is not None}


def target_name(config: dict[str, Any]) -> str | None:
    """The target that speculators' `speculators_config` names."""
    name: str | None = config.get("speculators_config", {}).get("verifier", {}).get("name_or_path")
    return name


logger = logging.getLogger(f"transformers.{__name__}")

_ID_FIELDS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layer_ids")
# Files whose ids count the boundary before a layer, as `hidden_states` of Transformers do; all others count the layer.
_BOUNDARY = {Publisher.EAGLE, Publisher.SPECULATORS}
_ANGELSLIM_BASE = 10000.0


def published_layer_ids(config: dict[str, Any]) -> tuple[str, list[int] | None]:
    """The field that has the layer ids, and the ids, ascending; `None` when the config leaves them to the default.

    Their order has no meaning: NVIDIA ModelOpt wrote them through a set, while features are in depth order.
    """
    return next(((field, sorted(config[field])) for field in _ID_FIELDS if config.get(field)), ("", None))


def feature_layers(
    config: dict[str, Any], publisher: Publisher, count: int, layer_count: int | None, source: str
) -> list[int]:
    """Feature layers in the `output_hidden_states` convention of Transformers, ascending.

    The number of layers itself is the index of the last layer's output, before the final norm (`features.FeatureTap`).

    Args:
        config: flat; the user's `feature_layers`, if any, win over published ids.
        publisher: decides what an id means.
        count: how many layers `fc` reads.
        layer_count: decoder layers of the target, when known.
        source: where from, for messages.

    Raises:
        ValueError: there are not `count` of them, or their meaning is uncertain.
    """
    given, (field, published) = config.get("feature_layers"), published_layer_ids(config)
    if given is not None:
        layers = sorted(given)
    elif published is not None:
        counts_boundaries = publisher in _BOUNDARY and field != "target_layer_ids"  # DeepSpec's, whatever the layer
        if counts_boundaries:
            layers = _of_boundaries(published, layer_count, source)
        else:
            layers = _of_layers(published, layer_count, source, is_certain=field == "target_layer_ids")
    elif layer_count is None:
        raise ValueError(
            f"{source} does not say which layers of its target it reads; the default depends on the target's depth. "
            "Pass `target=`, or `feature_layers=[...]`, counted as in `output_hidden_states`."
        )
    else:
        layers = default_feature_layers(layer_count)
    if len(layers) != count:
        raise ValueError(
            f"{source} has an fc that reads {count} layers of this target, but its layers are {layers}. "
            "Load a head made for this target (this one may need another hidden size), or pass "
            f"`feature_layers=[...]` with {count} distinct ids, counted as in `output_hidden_states`."
        )
    return layers


# Converters lift ids unchanged from one format to another, so a file's format alone does not tell what they count. The
# smallest id does, as in sgl-project/sglang #25454: EAGLE-3's own lowest features are the output of layer 1, which is
# boundary 2. For any other layers the convention of the format holds.


def _of_boundaries(ids: list[int], layer_count: int | None, source: str) -> list[int]:
    """Ids of a format that counts boundaries -> HF `hidden_states` indices."""
    if ids[0] != 1:
        return ids
    if layer_count is None:
        raise ValueError(
            f"The layer ids {ids} of {source} may count layers or the boundaries before them. "
            "Pass `target=`, or `feature_layers=[...]`, counted as in `output_hidden_states`."
        )
    if ids[-1] >= layer_count:  # no layer has that number
        return ids
    logger.warning(
        "%s: the layer ids %s are read as outputs of those layers. Try `resps doctor` if few tokens are accepted.",
        source,
        ids,
    )
    return [layer + 1 for layer in ids]


def _of_layers(ids: list[int], layer_count: int | None, source: str, is_certain: bool) -> list[int]:
    """Ids of a format that counts layers -> HF `hidden_states` indices."""
    # NVIDIA's gpt-oss v3 has 24, 30 and 36 of 36 layers (sglang #32226).
    beyond = layer_count is not None and ids[-1] == layer_count and ids[0] != 1
    if is_certain or not (ids[0] == 2 or beyond):
        return [layer + 1 for layer in ids]
    logger.warning(
        "%s: the layer ids %s are read as boundaries, not as layers. Try `resps doctor` if few tokens are accepted.",
        source,
        ids,
    )
    return ids


def rope_parameters(config: dict[str, Any], publisher: Publisher, overrides: dict[str, Any]) -> dict[str, Any]:
    """RoPE in the form of Transformers 5, from `rope_parameters` or `rope_theta` and `rope_scaling`.

    AngelSlim trains with base 10000 whatever its config says, so that is what is used unless overridden.

    Raises:
        ValueError: the config contradicts itself.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention") or rope)  # per layer type, as Transformers 5 writes it
    legacy_kind = rope.pop("type", None)
    kind = rope.get("rope_type") or legacy_kind or "default"
    if kind == "mrope" or "mrope_section" in rope:  # equal to plain RoPE where all tokens are text
        rope = {key: value for key, value in rope.items() if not key.startswith("mrope")}
        kind = "default" if kind == "mrope" else kind
    inner, outer = rope.get("rope_theta"), config.get("rope_theta")
    if inner is not None and outer is not None and inner != outer and "rope_theta" not in overrides:
        raise ValueError(
            f"The config states two RoPE bases, {inner} and {outer}. Pass the one used in training as `rope_theta=`; "
            "`resps doctor` tells which that is."
        )
    theta = overrides.get("rope_theta") or inner or outer or ROPE_BASE
    if publisher is Publisher.ANGELSLIM and not {"rope_theta", "rope_parameters"} & set(overrides):
        if theta != _ANGELSLIM_BASE:
            logger.warning("AngelSlim trains with RoPE base 10000; the config's %s is ignored.", theta)
        theta = _ANGELSLIM_BASE
    return {**rope, "rope_type": kind, "rope_theta": float(theta)}


def norm_flags(config: dict[str, Any], publisher: Publisher, source: str) -> dict[str, bool]:
    """`norm_before_residual` and `feedback_post_norm`.

    `norm_output` means the latter only in speculators files; in SpecForge's it says that logits are normed, which
    they always are.
    """
    before = config.get("norm_before_residual")
    if before is None and publisher is Publisher.SPECULATORS:
        logger.warning(
            "%s: true is used for the missing `norm_before_residual`. Try `resps doctor` if few tokens are accepted.",
            source,
        )
        before = True
    stated = config.get("feedback_post_norm")
    post = config.get("norm_output") is True and publisher is Publisher.SPECULATORS if stated is None else stated
    return {"norm_before_residual": bool(before), "feedback_post_norm": bool(post)}
