"""Whose layout a checkpoint has, from tensor names first and config second."""

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
