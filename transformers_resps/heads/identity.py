"""Identify targets and heads by names, sizes and hashes of weights, and check that a head fits a target."""

import hashlib
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..compat import plain_tensors, text_config


def target_identity(target: PreTrainedModel) -> dict[str, Any]:
    """Return the name and sizes of `target`, for `DraftHeadConfig.target`."""
    config = text_config(target)
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {"name_or_path": target.config.name_or_path, **{name: getattr(config, name) for name in sizes}}


def check_is_model(target: Any) -> None:
    """Raise a `ValueError` if `target` is not a model."""
    if not isinstance(getattr(target, "config", None), PreTrainedConfig):
        raise ValueError(
            f"`target` is a {type(target).__name__}, but must be the loaded model that the head drafts for. Pass what "
            "`AutoModelForCausalLM.from_pretrained` returns."
        )


def check_made_for(
    target: PreTrainedModel, sizes: dict[str, Any], known: dict[str, Any], feature_layers: list[int]
) -> None:
    """Raise a `ValueError` that names both models if a head was made for another model than `target`. `sizes` has the
    `vocab_size` and `hidden_size` that the head needs. `known` is the `target_identity` of the model that the head was
    made for, or a part of it.
    """
    check_is_model(target)
    theirs = target_identity(target)
    needed = sizes | {key: known[key] for key in ("num_hidden_layers", "model_type") if key in known}
    wrong = [f"{key} {needed[key]} (this target: {theirs[key]})" for key in needed if needed[key] != theirs[key]]
    if (feature_layers or [0])[-1] > theirs["num_hidden_layers"]:
        wrong.append(f"the hidden states {feature_layers} (this target: 0 to {theirs['num_hidden_layers']})")
    if wrong:
        raise ValueError(
            f"This head was made for {known.get('name_or_path') or 'another target'}, not for "
            f"{theirs['name_or_path'] or type(target).__name__}: it needs {', '.join(wrong)}. Load the head that "
            "belongs to this target (its MTP layers with `MtpHead.from_target`), or train one with `DraftHeadTrainer`."
        )


_SAMPLED = 64  # Approximate number of values of each parameter that are hashed.


def parameter_fingerprint(model: nn.Module) -> str:
    """Hash a few numbers of every parameter, which is quick for a model of any size. No parameter is left out, because
    a fine-tune may leave most parameters unchanged. For a quantized weight, codes and scales are hashed.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        for part in plain_tensors(parameter):
            numbers = part.detach().flatten()[:: max(1, part.numel() // _SAMPLED)]
            digest.update(numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
