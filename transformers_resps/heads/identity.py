"""Which models something was made for: names, sizes and fingerprints of a target and its head."""

import hashlib
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def target_identity(target: PreTrainedModel) -> dict[str, Any]:
    """Name and sizes of `target`, as kept in `DraftHeadConfig.target`."""
    config = target.config.get_text_config()
    return {
        "name_or_path": target.config.name_or_path,
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }


def check_is_model(target: Any) -> None:
    """Raise a `ValueError` for a `target` that is no model."""
    if not isinstance(getattr(target, "config", None), PreTrainedConfig):
        raise ValueError(
            f"`target` is a {type(target).__name__}, but must be the loaded model that the head drafts for. Pass what "
            "`AutoModelForCausalLM.from_pretrained` returns."
        )


_SAMPLED = 64  # numbers of each parameter


def parameter_fingerprint(model: nn.Module) -> str:
    """A hash of a few numbers of every parameter: quick for any size, and different after any training.

    Of every parameter, because a fine-tune may leave some as they were: a merged LoRA the output head, for example.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLED)]
        digest.update(name.encode() + numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
