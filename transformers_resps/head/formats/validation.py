"""The keyword arguments of `from_pretrained`: how to load, and what to correct. Knows no files."""

import math
from typing import Any

import torch
from transformers.activations import ACT2FN

from ..configuration import DraftHeadConfig


_HUB = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}
_LOADING = {
    "adapter_kwargs",
    "attn_implementation",
    "config",
    "device_map",
    "dtype",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "quantization_config",
    "state_dict",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
}
# Corrections of what publishers write and our own config says otherwise, or not at all.
_MOST = 2**31  # no size is near it; PyTorch's own errors for larger ones name nothing
PUBLISHED_ONLY = {"rope_theta", "sliding_window"}
_SIZES = (
    "draft_vocab_size",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "target_hidden_size",
    "vocab_size",
)
_FLAGS = (
    "attention_bias",
    "attention_output_bias",
    "fc_bias",
    "fc_norm",
    "feedback_post_norm",
    "mlp_bias",
    "norm_before_fc",
    "norm_before_residual",
    "owns_embedding",
    "owns_output_head",
    "qk_norm",
)


def split_keywords(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Keywords -> (where the files are, how Transformers loads them, corrections to the head's config).

    Raises:
        ValueError: a name is none of these, or a correction has the wrong type.
    """
    fields = set(DraftHeadConfig.__annotations__) | PUBLISHED_ONLY
    hub = {key: value for key, value in keywords.items() if key in _HUB}
    loading = {key: value for key, value in keywords.items() if key in _LOADING or key.startswith("_")}
    overrides = {key: value for key, value in keywords.items() if key in fields}
    unknown = sorted(set(keywords) - set(hub) - set(loading) - set(overrides))
    if unknown:
        raise ValueError(
            f"DraftHead.from_pretrained got {unknown}, which it does not know. Check the spelling: it takes the "
            f"loading arguments {sorted(_HUB | _LOADING)} and, to correct a head's config, {sorted(fields)}."
        )
    if overrides.get("sliding_window") is not None:
        raise ValueError(
            f"DraftHead.from_pretrained got `sliding_window={overrides['sliding_window']!r}`, but draft trees support "
            "no window. Pass `sliding_window=None` to ignore the head's own."
        )
    check_overrides(overrides, "DraftHead.from_pretrained")
    return hub, loading, overrides


def check_overrides(overrides: dict[str, Any], where: str) -> None:
    """Refuse values that no head can have, and `None` for a field that must have one.

    Raises:
        ValueError: names the field, its value and what it must be.
    """
    for key, value in overrides.items():
        if value is None and getattr(DraftHeadConfig, key, None) is not None:
            raise ValueError(f"{where} got `{key}=None`, but a head needs a value there. Pass one or leave it out.")
    check_fields(overrides, where)


def check_fields(fields: dict[str, Any], where: str) -> None:
    """Refuse values that no head can have; fields that are absent or None are fine.

    Raises:
        ValueError: names the field, its value and what it must be.
    """
    for key in _SIZES:
        value = fields.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST):
            raise ValueError(
                f"{where} has `{key}={value!r}`, but it must be a positive integer below {_MOST}. Correct it."
            )
    for key in _FLAGS:
        if not isinstance(fields.get(key), bool | None):
            raise ValueError(f"{where} has `{key}={fields[key]!r}`, but it must be true or false. Correct it.")
    for key in ("rope_theta", "rms_norm_eps"):
        value = fields.get(key)
        if value is not None and (
            not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf
        ):
            raise ValueError(f"{where} has `{key}={value!r}`, but it must be a positive number. Correct it.")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.get(key), dict | None):
            raise ValueError(
                f"{where} has `{key}={fields[key]!r}`, but it must be a dict. Write it like "
                '`{"rope_type": "default", "rope_theta": 10000.0}`, or leave it out.'
            )
    _check_names(fields, where)
    check_layers(fields.get("feature_layers"), where)
    _check_tree(fields.get("default_tree"), where)
    check_one_norm(fields, where)


def _check_names(fields: dict[str, Any], where: str) -> None:
    """The activation, the dtype and the target's facts."""
    if fields.get("hidden_act") is not None and str(fields["hidden_act"]) not in ACT2FN:
        raise ValueError(
            f"{where} has the activation {fields['hidden_act']!r}, which Transformers does not know. Pass "
            "`hidden_act=` with the right one."
        )
    if not isinstance(fields.get("target"), dict | None):
        raise ValueError(f"{where} has `target={fields['target']!r}`, but it must be a dict. Correct it.")
    if not isinstance(
        getattr(
            torch, str("float32" if fields.get("dtype") is None else fields["dtype"]).removeprefix("torch."), None
        ),
        torch.dtype,
    ):
        raise ValueError(f"{where} has `dtype={fields['dtype']!r}`, but it must name a torch dtype. Correct it.")


def check_one_norm(fields: dict[str, Any], where: str) -> None:
    """Refuse a norm over the concatenated features together with one over each.

    Raises:
        ValueError: both are there.
    """
    if fields.get("norm_before_fc") and fields.get("fc_norm"):
        raise ValueError(
            f"{where} has both `norm_before_fc` and `fc_norm`, but features are normed once. "
            "Keep the one that the head was trained with."
        )


def _check_tree(tree: Any, where: str) -> None:
    """Refuse a default tree that is no `TreeShape`."""
    if tree is None:
        return
    least = (1, 0, 1, 0)
    is_list = isinstance(tree, list | tuple) and len(tree) in (3, 4)
    if not is_list or not all(
        isinstance(size, int) and not isinstance(size, bool) and size >= low
        for size, low in zip(tree, least, strict=False)
    ):
        raise ValueError(
            f"{where} has `default_tree={tree!r}`, but it must be a list of total_tokens (at least 1), depth, top_k "
            "(at least 1) and optionally lookup. Write it like [60, 8, 10]."
        )


def check_layers(layers: Any, where: str) -> None:
    """Refuse feature layers that are not distinct integers from 0.

    Raises:
        ValueError: they are not.
    """
    if layers is None:
        return
    is_list = isinstance(layers, list | tuple) and len(layers) > 0
    if not is_list or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ValueError(
            f"{where} has the feature layers {layers!r}, but they must be a list of integers. Pass "
            "`feature_layers=[...]`, counted as in `output_hidden_states`."
        )
    if min(layers) < 0 or len(set(layers)) < len(layers):
        raise ValueError(
            f"{where} has the feature layers {list(layers)}, but they must be distinct and at least 0. Pass "
            "`feature_layers=[...]`, counted as in `output_hidden_states`."
        )
