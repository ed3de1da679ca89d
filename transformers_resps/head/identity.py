"""The identity of a target: what a head remembers of the model it was made for."""

from typing import Any

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
    """Refuse a `target` that is no model.

    Raises:
        ValueError: names its type.
    """
    if not isinstance(getattr(target, "config", None), PreTrainedConfig):
        raise ValueError(
            f"`target` is a {type(target).__name__}, but must be the loaded model that the head drafts for. Pass what "
            "`AutoModelForCausalLM.from_pretrained` returns."
        )
