"""Whose layout a checkpoint has, from tensor names first and config second. Knows no sizes."""

from enum import StrEnum
from typing import Any

from torch import Tensor


class Publisher(StrEnum):
    """Who wrote the file; each has its own conventions (see `conventions`)."""

    EAGLE = "eagle"
    SPECFORGE = "specforge"
    ANGELSLIM = "angelslim"
    MODELOPT = "modelopt"
    SPECULATORS = "speculators"
    DEEPSPEC = "deepspec"


_MODELOPT_FIELDS = {"use_input_layernorm_in_first_layer", "use_last_layernorm", "use_mtp_layernorm"}


def publisher_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Publisher:
    """Recognise the publisher.

    Args:
        config: `config.json` as published.
        tensors: under our names; only the names count.
    """
    architectures = [str(name) for name in config.get("architectures") or []]
    if {"speculators_model_type", "transformer_layer_config"} & set(config):
        return Publisher.SPECULATORS
    is_full = "d2t" not in tensors and "layers.0.self_attn.q_norm.weight" in tensors
    if is_full and "target_layer_ids" in config:
        return Publisher.DEEPSPEC
    if "Eagle3LlamaForCausalLM" in architectures or "modal_type" in config:
        return Publisher.ANGELSLIM
    eagle = config.get("eagle_config")
    if isinstance(eagle, dict) and _MODELOPT_FIELDS & set(eagle):
        return Publisher.MODELOPT
    if eagle is not None or "LlamaForCausalLMEagle3" in architectures:
        return Publisher.SPECFORGE
    return Publisher.EAGLE


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with speculators' nested `transformer_layer_config` lifted to the top, where it does not clash.

    Raises:
        ValueError: the nested config is not an object.
    """
    nested = config.get("transformer_layer_config")
    if nested is None:
        return dict(config)
    if not isinstance(nested, dict):
        raise ValueError(
            f"`transformer_layer_config` is {nested!r}, but must be the JSON object that describes the layer. "
            "Correct config.json."
        )
    return {**nested, **{key: value for key, value in config.items() if key != "transformer_layer_config"}}


def target_name(config: dict[str, Any]) -> str | None:
    """The target that speculators' `speculators_config` names."""
    speculators = config.get("speculators_config")
    verifier = speculators.get("verifier") if isinstance(speculators, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return name if isinstance(name, str) else None
